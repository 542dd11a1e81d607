//! The providers we know, and which of them a model's name means.

use std::collections::HashMap;
use std::sync::Arc;

use secrecy::SecretString;

use super::anthropic::Anthropic;
use super::openai::{Dialect, OpenAi};
use super::responses::AskedThere;
use super::{Echo, HttpClient, Provider};

/// A provider that needs nothing but a key.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Its name in model notations.
    pub name: &'static str,
    /// Where it is.
    pub base_url: &'static str,
    /// The environment variable of its key.
    pub key_variable: &'static str,
    /// The environment variable that moves it elsewhere.
    pub base_url_variable: &'static str,
    /// Whether it answers without a key, at its usual place on the same machine if nobody moves it.
    pub keyless: bool,
    wire: Wire,
}

/// Which wire format a provider speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    OpenAi(Dialect),
    Anthropic,
}

const fn openai_compatible(
    name: &'static str,
    base_url: &'static str,
    key_variable: &'static str,
    base_url_variable: &'static str,
) -> Known {
    let wire = Wire::OpenAi(Dialect::COMPATIBLE);
    Known {
        name,
        base_url,
        key_variable,
        base_url_variable,
        keyless: false,
        wire,
    }
}

/// Every provider we know.
pub const KNOWN: &[Known] = &[
    Known {
        wire: Wire::OpenAi(Dialect::OPENAI),
        ..openai_compatible(
            "openai",
            "https://api.openai.com/v1",
            "OPENAI_API_KEY",
            "OPENAI_BASE_URL",
        )
    },
    Known {
        name: "anthropic",
        base_url: "https://api.anthropic.com",
        key_variable: "ANTHROPIC_API_KEY",
        base_url_variable: "ANTHROPIC_BASE_URL",
        keyless: false,
        wire: Wire::Anthropic,
    },
    Known {
        wire: Wire::OpenAi(Dialect::GOOGLE),
        ..openai_compatible(
            "google",
            "https://generativelanguage.googleapis.com/v1beta/openai",
            "GEMINI_API_KEY",
            "GEMINI_BASE_URL",
        )
    },
    openai_compatible(
        "groq",
        "https://api.groq.com/openai/v1",
        "GROQ_API_KEY",
        "GROQ_BASE_URL",
    ),
    Known {
        wire: Wire::OpenAi(Dialect::MISTRAL),
        ..openai_compatible(
            "mistral",
            "https://api.mistral.ai/v1",
            "MISTRAL_API_KEY",
            "MISTRAL_BASE_URL",
        )
    },
    openai_compatible("xai", "https://api.x.ai/v1", "XAI_API_KEY", "XAI_BASE_URL"),
    Known {
        wire: Wire::OpenAi(Dialect::DEEPSEEK),
        ..openai_compatible(
            "deepseek",
            "https://api.deepseek.com/v1",
            "DEEPSEEK_API_KEY",
            "DEEPSEEK_BASE_URL",
        )
    },
    openai_compatible(
        "openrouter",
        "https://openrouter.ai/api/v1",
        "OPENROUTER_API_KEY",
        "OPENROUTER_BASE_URL",
    ),
    openai_compatible(
        "together",
        "https://api.together.xyz/v1",
        "TOGETHER_API_KEY",
        "TOGETHER_BASE_URL",
    ),
    openai_compatible(
        "fireworks",
        "https://api.fireworks.ai/inference/v1",
        "FIREWORKS_API_KEY",
        "FIREWORKS_BASE_URL",
    ),
    Known {
        keyless: true,
        ..openai_compatible(
            "ollama",
            "http://localhost:11434/v1",
            "OLLAMA_API_KEY",
            "OLLAMA_BASE_URL",
        )
    },
    Known {
        keyless: true,
        ..openai_compatible(
            "vllm",
            "http://localhost:8000/v1",
            "VLLM_API_KEY",
            "VLLM_BASE_URL",
        )
    },
];

/// Bare model ids by how they begin (contract 2.4.1).
const BARE: &[(&str, &str)] = &[
    ("claude-", "anthropic"),
    ("gpt-", "openai"),
    ("chatgpt-", "openai"),
    ("codex-", "openai"),
    ("o1", "openai"),
    ("o3", "openai"),
    ("o4-", "openai"),
    ("gemini-", "google"),
    ("mistral-", "mistral"),
    ("codestral-", "mistral"),
    ("devstral-", "mistral"),
    ("llama-", "groq"),
    ("llama3", "groq"),
    ("grok-", "xai"),
    ("deepseek-", "deepseek"),
];

/// A key for a provider, and where that is when not at its usual place.
#[derive(Debug, Clone)]
pub struct Credential {
    /// The key. Empty for a provider that needs none.
    pub key: SecretString,
    /// The base URL.
    pub base_url: Option<String>,
}

/// Credentials by provider.
pub type ProjectCredentials = HashMap<String, Credential>;

/// Why a model cannot be asked; ends a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// Nobody we know has it.
    #[error("no known provider has a model \"{0}\"; write `provider:model`")]
    Unknown(String),
    /// There is no key for its provider.
    #[error(
        "there is no key for {provider}; set one for the project, or {variable} for the server"
    )]
    NoCredentials {
        /// The provider.
        provider: String,
        /// The server's variable for it.
        variable: String,
    },
    /// The project's own base URL is not allowed.
    #[error("{0}")]
    BaseUrl(String),
}

/// Finds who serves a model.
#[derive(Debug)]
pub struct Providers {
    client: HttpClient,
    server: ProjectCredentials,
    /// Whether projects without a key of their own use the server's.
    shared: bool,
    asked_there: Arc<AskedThere>,
}

impl Providers {
    /// Providers with the server's own credentials, and whether projects may use those.
    pub fn new(client: HttpClient, server: ProjectCredentials, shared: bool) -> Self {
        Self {
            client,
            server,
            shared,
            asked_there: Arc::default(),
        }
    }

    /// Whether the name means a model, for all that can be said without a project's own providers.
    pub fn knows(&self, model: &str) -> bool {
        // `acme:model` may be a provider of the project's own, now or later.
        model
            .split_once([':', '/'])
            .is_some_and(|(provider, model)| !provider.is_empty() && !model.is_empty())
            || split(model, &ProjectCredentials::new()).is_some()
    }

    /// Whether a project may set a credential for this provider and base URL; a sentence why not.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self, provider: &str, base_url: Option<&str>) -> Result<(), String> {
        match base_url {
            Some(base_url) => self.client.check_base_url(base_url),
            None if KNOWN.iter().any(|known| known.name == provider) => Ok(()),
            None => Err(format!(
                "`{provider}` is not a known provider: give its `baseUrl`."
            )),
        }
    }

    /// Who serves a model, and the model as they know it. A project's own credential goes before the server's.
    ///
    /// # Errors
    /// [`ResolveError`].
    pub fn resolve(
        &self,
        model: &str,
        own: &ProjectCredentials,
    ) -> Result<(Arc<dyn Provider>, String), ResolveError> {
        let (provider, bare) =
            split(model, own).ok_or_else(|| ResolveError::Unknown(model.to_owned()))?;
        if provider == "echo" {
            return Ok((Arc::new(Echo), bare.to_owned()));
        }
        let known = KNOWN.iter().find(|known| known.name == provider);
        let wire = known.map_or(Wire::OpenAi(Dialect::COMPATIBLE), |known| known.wire);
        let usual = known.map(|known| known.base_url);
        let (credential, is_own) = match (
            own.get(provider),
            self.server.get(provider).filter(|_| self.shared),
        ) {
            (Some(credential), _) => (Some(credential), true),
            (None, credential) => (credential, false),
        };
        let key = match (credential, known) {
            (Some(credential), _) => credential.key.clone(),
            // What listens on the server's own machine is not for strangers.
            (None, Some(known)) if known.keyless && self.client.reaches_private_addresses() => {
                SecretString::default()
            }
            (None, known) => {
                let variable = known.map_or("", |known| match known.keyless {
                    true => known.base_url_variable,
                    false => known.key_variable,
                });
                let variable = variable.to_owned();
                return Err(ResolveError::NoCredentials {
                    provider: provider.to_owned(),
                    variable,
                });
            }
        };
        let chosen = credential.and_then(|credential| credential.base_url.as_deref());
        let by_tenant = is_own && chosen.is_some();
        if let Some(base_url) = chosen.filter(|_| by_tenant) {
            self.client
                .check_base_url(base_url)
                .map_err(ResolveError::BaseUrl)?;
        }
        let base_url = chosen
            .or(usual)
            .ok_or_else(|| ResolveError::Unknown(model.to_owned()))?;
        let base_url = base_url.trim_end_matches('/').to_owned();
        let provider: Arc<dyn Provider> = match wire {
            Wire::OpenAi(dialect) => Arc::new(OpenAi {
                client: self.client.clone(),
                name: provider.to_owned(),
                base_url,
                key,
                dialect,
                guarded: by_tenant,
                asked_there: self.asked_there.clone(),
            }),
            Wire::Anthropic => Arc::new(Anthropic::new(
                self.client.clone(),
                base_url,
                key,
                by_tenant,
            )),
        };
        Ok((provider, bare.to_owned()))
    }
}

/// Splits at the first `:` or `/` if a provider stands before it, else goes by the id's beginning (design 0.1).
fn split<'a>(model: &'a str, own: &ProjectCredentials) -> Option<(&'a str, &'a str)> {
    if let Some((provider, bare)) = model.split_once([':', '/']) {
        let is_provider = provider == "echo"
            || own.contains_key(provider)
            || KNOWN.iter().any(|known| known.name == provider);
        if is_provider && !bare.is_empty() {
            return Some((provider, bare));
        }
    }
    if model == "echo" {
        return Some(("echo", "echo"));
    }
    BARE.iter()
        .find(|(prefix, _)| model.starts_with(prefix))
        .map(|(_, provider)| (*provider, model))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_notations_name_a_provider_and_its_model() {
        let own: ProjectCredentials = [(
            "acme".to_owned(),
            Credential {
                key: SecretString::default(),
                base_url: None,
            },
        )]
        .into();
        for (model, expect) in [
            (
                "anthropic:claude-sonnet-4-5",
                Some(("anthropic", "claude-sonnet-4-5")),
            ),
            ("openai/gpt-5-mini", Some(("openai", "gpt-5-mini"))),
            (
                "openrouter/meta-llama/llama-4",
                Some(("openrouter", "meta-llama/llama-4")),
            ),
            ("ollama:qwen3:8b", Some(("ollama", "qwen3:8b"))),
            ("acme:house-model", Some(("acme", "house-model"))),
            ("claude-opus-4-1", Some(("anthropic", "claude-opus-4-1"))),
            ("gpt-5", Some(("openai", "gpt-5"))),
            ("llama3:8b", Some(("groq", "llama3:8b"))),
            ("o3", Some(("openai", "o3"))),
            ("echo", Some(("echo", "echo"))),
            ("nobody:model", None),
            ("openai:", None),
            ("mystery", None),
            ("", None),
        ] {
            assert_eq!(split(model, &own), expect, "{model}");
        }
    }
}
