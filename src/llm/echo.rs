//! The offline model: answers from nothing but the request, so a new server works at once.

use async_trait::async_trait;
use futures::{StreamExt, stream};

use super::{
    FinishReason, Message, ModelEvent, ModelRequest, ModelStream, Part, Provider, ProviderError,
    Usage,
};

/// Repeats the last user message, says that it is the offline model, and how to set a real one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Echo;

#[async_trait]
impl Provider for Echo {
    async fn stream(&self, request: ModelRequest) -> Result<ModelStream, ProviderError> {
        let said = last_user_text(&request.messages);
        let answer = format!(
            "You said: {said}\n\nThis is `echo`, the offline model. For a real one, set a \
             provider's key (such as OPENAI_API_KEY) for the server and PATCH this agent's \
             `model`, for example to \"openai:gpt-5-mini\"."
        );
        let usage = Usage {
            prompt_tokens: prompt_words(&request),
            completion_tokens: answer.split_whitespace().count() as u64,
            ..Usage::default()
        };
        let words: Vec<String> = answer.split_inclusive(' ').map(str::to_owned).collect();
        let finished = ModelEvent::Finished {
            reason: FinishReason::Stop,
            usage,
        };
        Ok(stream::iter(words)
            .map(ModelEvent::Text)
            .chain(stream::iter([finished]))
            .map(Ok)
            .boxed())
    }
}

fn last_user_text(messages: &[Message]) -> String {
    let parts = messages.iter().rev().find_map(|message| match message {
        Message::User { content } => Some(content),
        _ => None,
    });
    text_of(parts.map_or(&[], Vec::as_slice))
}

fn text_of(parts: &[Part]) -> String {
    let texts: Vec<&str> = parts
        .iter()
        .filter_map(|part| match part {
            Part::Text { text } => Some(text.as_str()),
            Part::Image { .. } => None,
        })
        .collect();
    texts.join("\n")
}

/// A word is a token to this model.
fn prompt_words(request: &ModelRequest) -> u64 {
    let words = |text: &str| text.split_whitespace().count() as u64;
    let conversation: u64 = request
        .messages
        .iter()
        .map(|message| match message {
            Message::System { content } | Message::Tool { content, .. } => words(content),
            Message::User { content } => words(&text_of(content)),
            Message::Assistant { content, .. } => content.as_deref().map_or(0, words),
        })
        .sum();
    conversation + request.system.as_deref().map_or(0, words)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answer(request: ModelRequest) -> Vec<ModelEvent> {
        let stream = Echo.stream(request).await.unwrap();
        stream.map(Result::unwrap).collect().await
    }

    fn saying(text: &str) -> ModelRequest {
        let content = vec![Part::Text {
            text: text.to_owned(),
        }];
        ModelRequest {
            messages: vec![Message::User { content }],
            ..ModelRequest::default()
        }
    }

    #[tokio::test]
    async fn it_answers_word_by_word_and_ends_with_one_finish() {
        let events = answer(saying("good morning")).await;
        let (last, words) = events.split_last().unwrap();
        let mut text = String::new();
        for word in words {
            let ModelEvent::Text(word) = word else {
                panic!("{word:?} before the end")
            };
            text.push_str(word);
        }
        assert!(words.len() > 10);
        assert!(text.starts_with("You said: good morning\n"));
        assert!(text.contains("offline model") && text.contains("OPENAI_API_KEY"));
        let completion_tokens = text.split_whitespace().count() as u64;
        let usage = Usage {
            prompt_tokens: 2,
            completion_tokens,
            ..Usage::default()
        };
        assert_eq!(
            *last,
            ModelEvent::Finished {
                reason: FinishReason::Stop,
                usage
            }
        );
    }

    #[tokio::test]
    async fn it_counts_the_whole_prompt() {
        let mut request = saying("one two");
        request.system = Some("three four five".to_owned());
        let events = answer(request).await;
        assert!(matches!(
            events.last(),
            Some(ModelEvent::Finished {
                usage: Usage {
                    prompt_tokens: 5,
                    ..
                },
                ..
            })
        ));
    }
}
