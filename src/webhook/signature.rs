//! Signatures as Standard Webhooks has them, which OpenAI's SDKs verify.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use secrecy::{ExposeSecret, SecretString};

use crate::seal::SealError;

const PREFIX: &str = "whsec_";

/// A new secret: `whsec_` and 256 random bits.
///
/// # Errors
/// [`SealError::Random`].
pub fn new_secret() -> Result<SecretString, SealError> {
    let mut bytes = [0; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| SealError::Random)?;
    Ok(format!("{PREFIX}{}", STANDARD.encode(bytes)).into())
}

/// A secret that signs. Never prints itself.
pub struct Signer(hmac::Key);

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signer")
    }
}

impl Signer {
    /// The signer of a secret that [`new_secret`] made; `None` of anything else.
    pub fn new(secret: &SecretString) -> Option<Self> {
        let encoded = secret.expose_secret().strip_prefix(PREFIX)?;
        let bytes = STANDARD.decode(encoded).ok()?;
        Some(Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes)))
    }

    /// The signature of a message: what `webhook-signature` holds, once for each secret.
    pub fn sign(&self, id: &str, timestamp: i64, body: &str) -> String {
        let mut context = hmac::Context::with_key(&self.0);
        for part in [id, ".", &timestamp.to_string(), ".", body] {
            context.update(part.as_bytes());
        }
        format!("v1,{}", STANDARD.encode(context.sign()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_as_the_standard_has_it() {
        // The example of the Standard Webhooks specification.
        let secret = SecretString::from("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let signer = Signer::new(&secret).unwrap();
        assert_eq!(
            signer.sign(
                "msg_p5jXN8AQM9LWM0D4loKWxJek",
                1_614_265_330,
                r#"{"test": 2432232314}"#
            ),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
    }

    #[test]
    fn secrets_differ_and_only_they_sign() {
        let (one, other) = (new_secret().unwrap(), new_secret().unwrap());
        assert_ne!(one.expose_secret(), other.expose_secret());
        assert!(Signer::new(&one).is_some());
        for text in ["", "whsec_", "sk_live_x", "whsec_???"] {
            let signer = Signer::new(&SecretString::from(text));
            assert_eq!(signer.is_some(), text == "whsec_", "{text}");
        }
    }
}
