//! What a provider gives with an answer and wants back.

use ring::digest::{SHA256, digest};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Message, ProviderError};

/// What a provider gave with an answer and wants back, mostly with the results of the tools that it calls: its thoughts, sealed or signed. Without
/// it some refuse to go on, and others think anew. Nobody but the adapter that made it looks into it, and no caller is shown it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProviderState {
    /// Whose it is: no other can read it.
    of: Owner,
    /// In the provider's own words.
    value: Value,
}

/// A model of a provider, with the account that it was asked with: what is sealed for one is not open to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Owner(String);

impl Owner {
    pub(super) fn new(provider: &str, base_url: &str, key: &SecretString, model: &str) -> Self {
        let account = format!("{base_url} {}", key.expose_secret());
        // Enough to tell accounts apart, and too little to tell anything else.
        let account = digest(&SHA256, account.as_bytes());
        let account: String = account.as_ref()[..4]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self(format!("{provider}:{model}#{account}"))
    }
}

impl ProviderState {
    pub(super) fn new(of: Owner, value: Value) -> Self {
        Self { of, value }
    }

    /// About how many bytes a model reads of it.
    pub fn size(&self) -> usize {
        weigh(&self.value, usize::MAX).unwrap_or_default()
    }
}

impl Message {
    /// What stands in its state, for the model that it is of.
    pub(super) fn state_for(&self, of: &Owner) -> Option<&Value> {
        match self {
            Self::Assistant {
                state: Some(state), ..
            } if state.of == *of => Some(&state.value),
            _ => None,
        }
    }
}

/// The most bytes that are kept of an answer, as many as it may say.
const LARGEST: usize = 32 * 1024 * 1024;
/// How deep they may be nested, so that what is stored can be read again.
const DEEPEST: usize = 32;

/// Counts what an adapter keeps of an answer while it comes: whoever serves a model may never come to an end.
#[derive(Debug, Default)]
pub(super) struct Weight(usize);

impl Weight {
    /// # Errors
    /// [`ProviderError::Protocol`] when it is too much, or too deep.
    pub(super) fn add(&mut self, piece: &Value) -> Result<(), ProviderError> {
        let bytes = weigh(piece, DEEPEST).ok_or_else(|| {
            ProviderError::Protocol("what it wants back is nested too deep".to_owned())
        })?;
        self.add_bytes(bytes)
    }

    /// # Errors
    /// [`ProviderError::Protocol`] when it is too much.
    pub(super) fn add_bytes(&mut self, bytes: usize) -> Result<(), ProviderError> {
        self.0 += bytes;
        if self.0 > LARGEST {
            return Err(ProviderError::Protocol(
                "what it wants back is too large".to_owned(),
            ));
        }
        Ok(())
    }
}

/// The bytes of a value, about; `None` if it is nested deeper than that.
fn weigh(value: &Value, depth: usize) -> Option<usize> {
    /// What a value takes that is no text.
    const SMALL: usize = 16;
    match value {
        Value::String(text) => Some(text.len() + SMALL),
        Value::Array(items) => items.iter().try_fold(SMALL, |sum, item| {
            Some(sum + weigh(item, depth.checked_sub(1)?)?)
        }),
        Value::Object(members) => members.iter().try_fold(SMALL, |sum, (name, member)| {
            Some(sum + name.len() + weigh(member, depth.checked_sub(1)?)?)
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => Some(SMALL),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_kept_is_bounded_in_size_and_depth() {
        let mut weight = Weight::default();
        let text = json!({"text": "x".repeat(LARGEST / 2)});
        weight.add(&text).unwrap();
        assert!(weight.add(&text).is_err());
        let nested = |depth| (0..depth).fold(json!(1), |inner, _| json!([inner]));
        assert!(Weight::default().add(&nested(DEEPEST)).is_ok());
        assert!(Weight::default().add(&nested(DEEPEST + 1)).is_err());
        let small = json!({"a": vec![1; 1_000]});
        assert!(weigh(&small, DEEPEST).unwrap() > 1_000);
    }

    #[test]
    fn a_state_is_of_one_model_of_one_account() {
        let of = |url: &str, key: &str, model: &str| {
            Owner::new("openai", url, &SecretString::from(key), model)
        };
        let mine = of("https://a", "k1", "m");
        let message = Message::Assistant {
            content: None,
            tool_calls: Vec::new(),
            state: Some(ProviderState::new(mine.clone(), json!(7))),
        };
        assert_eq!(message.state_for(&mine), Some(&json!(7)));
        for other in [
            of("https://b", "k1", "m"),
            of("https://a", "k2", "m"),
            of("https://a", "k1", "n"),
        ] {
            assert_eq!(message.state_for(&other), None, "{other:?}");
        }
        assert!(!format!("{mine:?}").contains("k1"));
    }
}
