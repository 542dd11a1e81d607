//! Secrets at rest and in hand: API keys, and credentials sealed under the master key.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use secrecy::{ExposeSecret, SecretString};

/// The system has no random bytes to give, or a sealed value is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The system's random source failed.
    #[error("the system's random source failed")]
    Random,
    /// The value was sealed by another master key, or altered.
    #[error("the value was not sealed by this master key, or was altered since")]
    Foreign,
    /// The master key is not 64 hexadecimal digits.
    #[error("a master key is 64 hexadecimal digits")]
    Malformed,
}

/// Seals credentials with AES-256-GCM. Never prints its key.
pub struct Seal {
    key: LessSafeKey,
    id: String,
    random: SystemRandom,
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Seal {
    /// The seal of a master key of 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`SealError::Malformed`].
    pub fn new(master_key: &SecretString) -> Result<Self, SealError> {
        let bytes = from_hex(master_key.expose_secret()).ok_or(SealError::Malformed)?;
        let key = UnboundKey::new(&AES_256_GCM, &bytes).map_err(|_| SealError::Malformed)?;
        // Names the key without telling anything of it, so that rows say which key opens them.
        let id = hex(&digest(&SHA256, &bytes).as_ref()[..4]);
        Ok(Self {
            key: LessSafeKey::new(key),
            id,
            random: SystemRandom::new(),
        })
    }

    /// The master key's name, stored beside what it sealed.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Seals a secret. `context` names where it belongs; it must be the same at [`Seal::open`],
    /// so a sealed value moved to another row does not open.
    ///
    /// # Errors
    /// [`SealError::Random`].
    pub fn seal(&self, context: &str, secret: &SecretString) -> Result<Vec<u8>, SealError> {
        let mut nonce = [0; NONCE_LEN];
        self.random
            .fill(&mut nonce)
            .map_err(|_| SealError::Random)?;
        let mut sealed = secret.expose_secret().as_bytes().to_vec();
        self.key
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(context),
                &mut sealed,
            )
            .map_err(|_| SealError::Random)?;
        Ok([&nonce[..], &sealed].concat())
    }

    /// Opens what [`Seal::seal`] made.
    ///
    /// # Errors
    /// [`SealError::Foreign`].
    pub fn open(&self, context: &str, sealed: &[u8]) -> Result<SecretString, SealError> {
        let (nonce, rest) = sealed
            .split_first_chunk::<NONCE_LEN>()
            .ok_or(SealError::Foreign)?;
        let mut rest = rest.to_vec();
        let plain = self
            .key
            .open_in_place(
                Nonce::assume_unique_for_key(*nonce),
                Aad::from(context),
                &mut rest,
            )
            .map_err(|_| SealError::Foreign)?;
        String::from_utf8(plain.to_vec())
            .map(SecretString::from)
            .map_err(|_| SealError::Foreign)
    }
}

/// Random text of 256 bits, for keys and tokens.
///
/// # Errors
/// [`SealError::Random`].
pub fn random_secret() -> Result<String, SealError> {
    let mut bytes = [0; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| SealError::Random)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// A new master key.
///
/// # Errors
/// [`SealError::Random`].
pub fn new_master_key() -> Result<SecretString, SealError> {
    let mut bytes = [0; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| SealError::Random)?;
    Ok(hex(&bytes).into())
}

/// The SHA-256 of a text.
pub fn sha256(text: &str) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
    hash
}

/// A secret with its middle left out, for its owner to recognize.
pub fn masked(secret: &SecretString) -> String {
    let secret: Vec<char> = secret.expose_secret().chars().collect();
    if secret.len() < 12 {
        return "…".to_owned();
    }
    let start: String = secret[..4].iter().collect();
    let end: String = secret[secret.len() - 4..].iter().collect();
    format!("{start}…{end}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal() -> Seal {
        Seal::new(&new_master_key().unwrap()).unwrap()
    }

    #[test]
    fn a_sealed_secret_opens_only_in_its_place_and_with_its_key() {
        let ours = seal();
        let secret = SecretString::from("sk-provider-key");
        let sealed = ours.seal("project-a/openai", &secret).unwrap();
        assert!(!sealed.windows(6).any(|window| window == b"sk-pro"));
        assert_eq!(
            ours.open("project-a/openai", &sealed)
                .unwrap()
                .expose_secret(),
            "sk-provider-key"
        );
        assert_eq!(
            ours.open("project-b/openai", &sealed).unwrap_err(),
            SealError::Foreign
        );
        assert_eq!(
            seal().open("project-a/openai", &sealed).unwrap_err(),
            SealError::Foreign
        );
        for at in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[at] ^= 1;
            assert_eq!(
                ours.open("project-a/openai", &altered).unwrap_err(),
                SealError::Foreign,
                "byte {at}"
            );
        }
        assert_eq!(
            ours.open("project-a/openai", &[]).unwrap_err(),
            SealError::Foreign
        );
    }

    #[test]
    fn a_malformed_master_key_is_refused() {
        for key in ["", "00", &"g".repeat(64), &"é".repeat(32), &"0".repeat(63)] {
            assert_eq!(
                Seal::new(&SecretString::from(key)).unwrap_err(),
                SealError::Malformed,
                "{key}"
            );
        }
    }

    #[test]
    fn a_mask_shows_eight_letters_at_most() {
        assert_eq!(masked(&SecretString::from("sk-1234567890")), "sk-1…7890");
        assert_eq!(masked(&SecretString::from("short")), "…");
    }
}
