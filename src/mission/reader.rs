//! Reads documents member by member and keeps every fault, so that a caller can mend them all at once.

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// An object being read: where it stands in the document, its members, and what was found wrong so far.
#[derive(Debug)]
pub(super) struct Reader<'a, 'f> {
    path: String,
    members: &'a Map<String, Value>,
    faults: &'f mut Vec<String>,
}

impl<'a, 'f> Reader<'a, 'f> {
    /// Reads `members`, which stand at `path` (`""`, or `tasks[3].`).
    pub(super) fn new(
        path: String,
        members: &'a Map<String, Value>,
        faults: &'f mut Vec<String>,
    ) -> Self {
        Self {
            path,
            members,
            faults,
        }
    }

    /// Notes a fault of a member.
    pub(super) fn fault(&mut self, member: &str, what: &str) {
        self.faults.push(format!("{}{member}: {what}", self.path));
    }

    /// Notes a fault that names its place itself.
    pub(super) fn fault_as_told(&mut self, what: &str) {
        self.faults.push(format!("{}{what}", self.path));
    }

    /// A member that is there; null is as good as absent.
    pub(super) fn get(&self, member: &str) -> Option<&'a Value> {
        self.members.get(member).filter(|value| !value.is_null())
    }

    /// A text of at most `most` characters, blank being absent.
    pub(super) fn text(&mut self, member: &str, most: usize) -> Option<String> {
        match self.get(member)? {
            Value::String(text) if text.trim().is_empty() => None,
            Value::String(text) if text.chars().count() <= most => Some(text.clone()),
            Value::String(_) => {
                self.fault(member, &format!("at most {most} characters"));
                None
            }
            _ => {
                self.fault(member, "must be a text");
                None
            }
        }
    }

    /// A text that must be there.
    pub(super) fn needed_text(&mut self, member: &str, most: usize) -> String {
        let before = self.faults.len();
        let text = self.text(member, most);
        if text.is_none() && self.faults.len() == before {
            self.fault(member, "required");
        }
        text.unwrap_or_default()
    }

    /// A number within bounds.
    pub(super) fn number(&mut self, member: &str, least: f64, most: f64) -> Option<f64> {
        let value = self.get(member)?;
        let number = value
            .as_f64()
            .filter(|number| (least..=most).contains(number));
        if number.is_none() {
            self.fault(member, &format!("must be a number from {least} to {most}"));
        }
        number
    }

    /// A whole number within bounds.
    pub(super) fn whole(&mut self, member: &str, least: u64, most: u64) -> Option<u64> {
        let value = self.get(member)?;
        let number = value
            .as_u64()
            .filter(|number| (least..=most).contains(number));
        if number.is_none() {
            let what = format!("must be a whole number from {least} to {most}");
            self.fault(member, &what);
        }
        number
    }

    /// True or false.
    pub(super) fn flag(&mut self, member: &str) -> Option<bool> {
        let value = self.get(member)?;
        let flag = value.as_bool();
        if flag.is_none() {
            self.fault(member, "must be true or false");
        }
        flag
    }

    /// An instant, ISO 8601 with its zone.
    pub(super) fn date(&mut self, member: &str) -> Option<DateTime<Utc>> {
        let value = self.get(member)?;
        let date = value
            .as_str()
            .and_then(|text| DateTime::parse_from_rfc3339(text).ok());
        if date.is_none() {
            self.fault(member, "must be a date such as 2026-04-07T12:00:00Z");
        }
        date.map(|date| date.with_timezone(&Utc))
    }

    /// A list of texts, none of them blank or twice; `None` when absent or not such a list.
    pub(super) fn texts(&mut self, member: &str) -> Option<Vec<String>> {
        let texts: Option<Vec<String>> = match self.get(member)? {
            Value::Array(items) => items
                .iter()
                .map(|item| {
                    item.as_str()
                        .filter(|text| !text.trim().is_empty())
                        .map(str::to_owned)
                })
                .collect(),
            _ => None,
        };
        match texts {
            None => {
                self.fault(member, "must be a list of texts");
                None
            }
            Some(texts) => {
                let mut seen = std::collections::HashSet::new();
                if let Some(twice) = texts.iter().find(|text| !seen.insert(text.as_str())) {
                    self.fault(member, &format!("\"{twice}\" occurs twice"));
                }
                Some(texts)
            }
        }
    }

    /// A list of objects, at most `most`, each with its place.
    pub(super) fn objects(
        &mut self,
        member: &str,
        most: usize,
    ) -> Vec<(String, &'a Map<String, Value>)> {
        let Some(value) = self.get(member) else {
            return Vec::new();
        };
        let Value::Array(items) = value else {
            self.fault(member, "must be a list of objects");
            return Vec::new();
        };
        if items.len() > most {
            self.fault(member, &format!("at most {most}"));
            return Vec::new();
        }
        let mut objects = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match item {
                Value::Object(members) => {
                    objects.push((format!("{}{member}[{index}].", self.path), members));
                }
                _ => self.fault(&format!("{member}[{index}]"), "must be an object"),
            }
        }
        objects
    }

    /// A member of a type that reads itself.
    pub(super) fn typed<T: DeserializeOwned>(&mut self, member: &str) -> Option<T> {
        match T::deserialize(self.get(member)?) {
            Ok(value) => Some(value),
            Err(error) => {
                self.fault(member, &error.to_string());
                None
            }
        }
    }
}
