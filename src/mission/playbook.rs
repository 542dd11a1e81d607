//! Playbooks: mission documents with `{{placeholders}}` and the parameters that fill them (contract 2.17).

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

/// The most playbooks that a project keeps.
pub const MOST_PLAYBOOKS: i64 = 500;

/// The longest name of a playbook or a parameter.
const LONGEST_NAME: usize = 64;

/// The most parameters of a playbook, values in an `enum`, tags, and warnings about a run.
const MOST: usize = 50;

/// The longest description, version, author, tag, and text in an `enum`, in characters.
const LONGEST_TEXT: usize = 2000;

/// The most bytes that a playbook takes as JSON.
const LARGEST: usize = 1024 * 1024;

/// The most bytes that its parameters take as JSON: a list of playbooks shows the parameters of all.
const LARGEST_PARAMETERS: usize = 64 * 1024;

/// The most text that a filled mission holds, in bytes: a long value can stand in many places.
const LARGEST_FILLED: usize = 4 * LARGEST;

/// The most characters of a value that the summary shows.
const SHOWN: usize = 200;

/// A mission to be filled in.
#[derive(Debug, Clone, PartialEq, Serialize, utoipa::ToSchema)]
pub struct Playbook {
    /// Lower-case words of letters and digits, joined by `-`; unique in the project.
    #[schema(max_length = 64, example = "bug-fix")]
    pub name: String,
    /// What it is for.
    pub description: String,
    /// A mission's document, with `{{name}}` where a parameter's value goes.
    pub mission: Map<String, Value>,
    /// What can be filled in, at most 50.
    #[schema(required = false)]
    pub parameters: Vec<Parameter>,
    /// Its version, for people to read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Who wrote it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// For other systems to read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
}

/// What can be filled in.
#[derive(Debug, Clone, PartialEq, Serialize, utoipa::ToSchema)]
#[schema(as = PlaybookParameter)]
pub struct Parameter {
    /// Letters, digits, `_` and `-`; unique in the playbook.
    #[schema(max_length = 64)]
    pub name: String,
    /// What it means.
    pub description: String,
    /// What its values are; `string` when absent.
    #[serde(rename = "type")]
    #[schema(required = false)]
    pub kind: ParameterType,
    /// Whether a run must give it, unless it has a default.
    #[schema(required = false)]
    pub required: bool,
    /// Its value when a run gives none: a string, a number or a boolean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default: Option<Value>,
    /// The only values that it may have.
    #[serde(rename = "enum", skip_serializing_if = "Option::is_none")]
    pub choices: Option<Vec<Value>>,
}

/// What a parameter's values are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = PlaybookParameterType)]
pub enum ParameterType {
    /// Text.
    #[default]
    String,
    /// A number, also written as text.
    Number,
    /// `true`, `1` or `yes`, or `false`, `0` or `no`, in any case.
    Boolean,
}

/// A playbook's mission with its values in place.
#[derive(Debug, Clone, PartialEq)]
pub struct Filled {
    /// The mission's document.
    pub mission: Map<String, Value>,
    /// What was given and has no place.
    pub warnings: Vec<String>,
    /// `playbook:<name> (k=v, …)`, in the parameters' order; a long value is cut short.
    pub summary: String,
}

impl Playbook {
    /// Reads a playbook. Its `mission` may also be JSON text, as `polpo deploy` sends it (contract 2.19). Members that
    /// are not known are left out. A placeholder without a parameter is found by [`Playbook::fill`], so that a playbook can
    /// be kept while it is being written.
    ///
    /// # Errors
    /// A sentence for everything that is wrong.
    pub fn parse(body: &Value) -> Result<Self, Vec<String>> {
        let Some(body) = body.as_object() else {
            return Err(vec!["The playbook must be an object.".to_owned()]);
        };
        let mut faults = Faults::default();
        if serde_json::to_string(body).map_or(0, |text| text.len()) > LARGEST {
            faults.add("The playbook may take at most 1 MiB as JSON.");
        }
        let playbook = Self {
            name: read_name(body, &mut faults),
            description: faults.text(body, "", "description").unwrap_or_else(|| {
                faults.add("`description` is required.");
                String::new()
            }),
            mission: read_mission(body, &mut faults),
            parameters: read_parameters(body, &mut faults),
            version: faults.text(body, "", "version"),
            author: faults.text(body, "", "author"),
            tags: read_tags(body, &mut faults),
        };
        faults.or(playbook)
    }

    /// Puts values in place of the placeholders, in every text of the mission and in no key. A missing or empty value is
    /// the default, or empty. A text that is nothing but the placeholder of a number or a boolean becomes one. What was put
    /// in place is not looked at again, so no value can name another.
    ///
    /// # Errors
    /// A sentence for everything that is wrong: values that are required, of another type, or not among the choices,
    /// placeholders without a parameter, and a mission that would be too large.
    pub fn fill(&self, params: &Map<String, Value>) -> Result<Filled, Vec<String>> {
        let mut faults = Faults::default();
        let mut values = Vec::with_capacity(self.parameters.len());
        for parameter in &self.parameters {
            let value = parameter.value(params.get(&parameter.name));
            let value = value.unwrap_or_else(|fault| {
                faults.add(fault);
                // Its placeholders are known all the same.
                None
            });
            values.push(Given {
                name: &parameter.name,
                text: value.as_ref().map(text_of).unwrap_or_default(),
                value,
            });
        }
        let mut filler = Filler {
            values: &values,
            left: LARGEST_FILLED,
            faults,
        };
        let mission = filler.object(&self.mission);
        filler.faults.or(Filled {
            mission,
            warnings: self.warnings(params),
            summary: self.summary(&values),
        })
    }

    fn warnings(&self, params: &Map<String, Value>) -> Vec<String> {
        let known = |name: &str| self.parameters.iter().any(|known| known.name == name);
        params
            .keys()
            .filter(|name| !known(name))
            .take(MOST)
            .map(|name| format!("Unknown parameter: {}", cut(name)))
            .collect()
    }

    fn summary(&self, values: &[Given<'_>]) -> String {
        let given: Vec<String> = values
            .iter()
            .filter(|given| given.value.is_some())
            .map(|given| format!("{}={}", given.name, cut(&given.text)))
            .collect();
        if given.is_empty() {
            format!("playbook:{}", self.name)
        } else {
            format!("playbook:{} ({})", self.name, given.join(", "))
        }
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

impl Parameter {
    /// The value for a run; `None` when it is to be left empty.
    fn value(&self, given: Option<&Value>) -> Result<Option<Value>, String> {
        let given = given.filter(|value| !value.is_null() && **value != "");
        let Some(value) = given.or(self.default.as_ref()) else {
            return if self.required {
                Err(format!("{} is required", self.name))
            } else {
                Ok(None)
            };
        };
        let value = self.kind.read(value).ok_or_else(|| {
            let wanted = self.kind.wanted();
            format!("{} must be {wanted}", self.name)
        })?;
        match &self.choices {
            Some(choices) if !self.is_choice(choices, &value) => {
                let choices: Vec<String> = choices.iter().map(text_of).collect();
                Err(format!(
                    "{} must be one of: {}",
                    self.name,
                    cut(&choices.join(", "))
                ))
            }
            _ => Ok(Some(value)),
        }
    }

    fn is_choice(&self, choices: &[Value], value: &Value) -> bool {
        choices
            .iter()
            .filter_map(|choice| self.kind.read(choice))
            .any(|choice| match (choice.as_f64(), value.as_f64()) {
                (Some(choice), Some(value)) => choice == value,
                _ => choice == *value,
            })
    }
}

impl ParameterType {
    /// What a value means as this type; `None` when nothing.
    fn read(self, value: &Value) -> Option<Value> {
        match (self, value) {
            (_, Value::Null | Value::Array(_) | Value::Object(_)) => None,
            (Self::String, value) => Some(Value::String(text_of(value))),
            (Self::Number, Value::Number(_)) => Some(value.clone()),
            (Self::Number, Value::String(text)) => read_number(text.trim()).map(Value::Number),
            (Self::Number, Value::Bool(_)) => None,
            (Self::Boolean, value) => {
                let word = text_of(value).trim().to_ascii_lowercase();
                match word.as_str() {
                    "true" | "1" | "yes" => Some(Value::Bool(true)),
                    "false" | "0" | "no" => Some(Value::Bool(false)),
                    _ => None,
                }
            }
        }
    }

    fn wanted(self) -> &'static str {
        match self {
            Self::String => "a string",
            Self::Number => "a number",
            Self::Boolean => "a boolean (true, false, 1, 0, yes or no)",
        }
    }
}

fn read_number(text: &str) -> Option<Number> {
    match text.parse::<i64>() {
        Ok(whole) => Some(whole.into()),
        // Words like `inf` are no numbers in JSON, and `from_f64` refuses them.
        Err(_) => text.parse().ok().and_then(Number::from_f64),
    }
}

/// A parameter's value in a run, and how it reads within a text.
struct Given<'a> {
    name: &'a str,
    value: Option<Value>,
    text: String,
}

/// Puts values in place and counts what it writes.
struct Filler<'a> {
    values: &'a [Given<'a>],
    left: usize,
    faults: Faults,
}

impl Filler<'_> {
    fn object(&mut self, object: &Map<String, Value>) -> Map<String, Value> {
        object
            .iter()
            .map(|(key, value)| (key.clone(), self.value(value)))
            .collect()
    }

    fn value(&mut self, value: &Value) -> Value {
        match value {
            Value::String(text) => self.text(text),
            Value::Array(items) => items.iter().map(|item| self.value(item)).collect(),
            Value::Object(object) => Value::Object(self.object(object)),
            other => other.clone(),
        }
    }

    fn text(&mut self, text: &str) -> Value {
        let mut filled = String::new();
        let mut rest = text;
        while let Some(start) = rest.find("{{") {
            let Some((name, length)) = placeholder(&rest[start..]) else {
                self.write(&mut filled, &rest[..=start]);
                rest = &rest[start + 1..];
                continue;
            };
            self.write(&mut filled, &rest[..start]);
            rest = &rest[start + length..];
            let Some(given) = self.values.iter().find(|given| given.name == name) else {
                self.faults.add(format!(
                    "{{{{{name}}}}} has no parameter: declare \"{name}\" in `parameters`"
                ));
                continue;
            };
            match &given.value {
                Some(value @ (Value::Number(_) | Value::Bool(_))) if length == text.len() => {
                    return value.clone();
                }
                _ => self.write(&mut filled, &given.text),
            }
        }
        self.write(&mut filled, rest);
        Value::String(filled)
    }

    fn write(&mut self, filled: &mut String, text: &str) {
        if self.count(text.len()) {
            filled.push_str(text);
        }
    }

    /// Whether there is room for so many bytes more.
    fn count(&mut self, bytes: usize) -> bool {
        let left = self.left.checked_sub(bytes);
        if left.is_none() {
            self.faults
                .add("The filled mission may hold at most 4 MiB of text: give shorter values");
        }
        // Whatever comes after is too much as well.
        self.left = left.unwrap_or(0);
        left.is_some()
    }
}

/// The name and the length of the placeholder that a text begins with. Any other braces are text.
fn placeholder(text: &str) -> Option<(&str, usize)> {
    let inside = text.strip_prefix("{{")?.trim_start();
    let end = inside.find(|c| !is_name_character(c))?;
    let (name, rest) = inside.split_at(end);
    let rest = rest.trim_start().strip_prefix("}}")?;
    is_name(name).then(|| (name, text.len() - rest.len()))
}

fn is_name_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

fn is_name(name: &str) -> bool {
    (1..=LONGEST_NAME).contains(&name.len()) && name.chars().all(is_name_character)
}

/// What is wrong, each once.
#[derive(Debug, Default)]
struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, fault: impl Into<String>) {
        let fault = fault.into();
        if self.0.len() < MOST && !self.0.contains(&fault) {
            self.0.push(fault);
        }
    }

    fn or<T>(self, value: T) -> Result<T, Vec<String>> {
        if self.0.is_empty() {
            Ok(value)
        } else {
            Err(self.0)
        }
    }

    /// A member that is a text with something in it, if it is there. `place` says of which object.
    fn text(&mut self, object: &Map<String, Value>, place: &str, member: &str) -> Option<String> {
        let value = present(object, member)?;
        match value.as_str().filter(|text| is_text(text)) {
            Some(text) => Some(text.to_owned()),
            None => {
                self.add(format!(
                    "`{place}{member}` must be a string of 1 to {LONGEST_TEXT} characters."
                ));
                // It is there, so nobody need say that it is missing.
                Some(String::new())
            }
        }
    }
}

fn is_text(text: &str) -> bool {
    !text.is_empty() && text.chars().count() <= LONGEST_TEXT
}

/// A member; null is absent.
fn present<'a>(object: &'a Map<String, Value>, member: &str) -> Option<&'a Value> {
    object.get(member).filter(|value| !value.is_null())
}

fn read_name(body: &Map<String, Value>, faults: &mut Faults) -> String {
    let name = present(body, "name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let kebab = name.split('-').all(|word| {
        let mut letters = word.bytes();
        !word.is_empty() && letters.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    });
    if !kebab || name.len() > LONGEST_NAME {
        faults.add(format!(
            "`name` must be kebab-case like `bug-fix`: lower-case letters and digits in words joined by `-`, at most {LONGEST_NAME} characters."
        ));
    }
    name.to_owned()
}

fn read_mission(body: &Map<String, Value>, faults: &mut Faults) -> Map<String, Value> {
    let mission = match present(body, "mission") {
        Some(Value::String(text)) => serde_json::from_str(text).ok(),
        Some(Value::Object(mission)) => Some(mission.clone()),
        _ => None,
    };
    mission
        .filter(|mission| !mission.is_empty())
        .unwrap_or_else(|| {
            faults.add("`mission` is required: an object, the mission's document.");
            Map::new()
        })
}

fn read_tags(body: &Map<String, Value>, faults: &mut Faults) -> Option<Vec<String>> {
    let tags = serde_json::from_value(present(body, "tags")?.clone()).ok();
    let fine = |tags: &Vec<String>| tags.len() <= MOST && tags.iter().all(|tag| is_text(tag));
    let tags = tags.filter(fine);
    if tags.is_none() {
        faults.add(format!(
            "`tags` must be at most {MOST} strings of 1 to {LONGEST_TEXT} characters."
        ));
    }
    tags
}

fn read_parameters(body: &Map<String, Value>, faults: &mut Faults) -> Vec<Parameter> {
    let items = match present(body, "parameters") {
        None => return Vec::new(),
        Some(Value::Array(items)) if items.len() <= MOST => items,
        Some(_) => {
            faults.add(format!(
                "`parameters` must be an array of at most {MOST} objects."
            ));
            return Vec::new();
        }
    };
    if serde_json::to_string(items).map_or(0, |text| text.len()) > LARGEST_PARAMETERS {
        faults.add("`parameters` may take at most 64 KiB as JSON.");
    }
    let mut parameters: Vec<Parameter> = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let place = format!("parameters[{index}]");
        let Some(object) = item.as_object() else {
            faults.add(format!("`{place}` must be an object."));
            continue;
        };
        let parameter = read_parameter(object, &place, faults);
        if parameters.iter().any(|other| other.name == parameter.name) {
            faults.add(format!(
                "`{place}.name` \"{}\" occurs twice.",
                parameter.name
            ));
        }
        parameters.push(parameter);
    }
    parameters
}

fn read_parameter(object: &Map<String, Value>, place: &str, faults: &mut Faults) -> Parameter {
    let name = present(object, "name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if !is_name(name) {
        faults.add(format!(
            "`{place}.name` must be 1 to {LONGEST_NAME} letters, digits, `_` or `-`."
        ));
    }
    let kind = present(object, "type").map_or(Some(ParameterType::default()), |kind| {
        serde_json::from_value(kind.clone()).ok()
    });
    if kind.is_none() {
        faults.add(format!(
            "`{place}.type` must be `string`, `number` or `boolean`."
        ));
    }
    let required = present(object, "required").map_or(Some(false), Value::as_bool);
    if required.is_none() {
        faults.add(format!("`{place}.required` must be true or false."));
    }
    let description = faults
        .text(object, &format!("{place}."), "description")
        .unwrap_or_else(|| {
            faults.add(format!("`{place}.description` is required."));
            String::new()
        });
    let parameter = Parameter {
        name: name.to_owned(),
        description,
        kind: kind.unwrap_or_default(),
        required: required.unwrap_or_default(),
        default: present(object, "default").cloned(),
        choices: read_choices(object, kind, place, faults),
    };
    check_default(&parameter, kind, place, faults);
    parameter
}

fn read_choices(
    object: &Map<String, Value>,
    kind: Option<ParameterType>,
    place: &str,
    faults: &mut Faults,
) -> Option<Vec<Value>> {
    let choices = present(object, "enum")?.as_array();
    let fits = |choice: &Value| {
        let short = choice.as_str().is_none_or(is_text);
        short && kind.is_none_or(|kind| kind.read(choice).is_some())
    };
    let choices =
        choices.filter(|choices| (1..=MOST).contains(&choices.len()) && choices.iter().all(fits));
    if choices.is_none() {
        faults.add(format!(
            "`{place}.enum` must be an array of 1 to {MOST} values of the parameter's type."
        ));
    }
    choices.cloned()
}

/// A default must do where no value is given.
fn check_default(
    parameter: &Parameter,
    kind: Option<ParameterType>,
    place: &str,
    faults: &mut Faults,
) {
    let Some(default) = parameter.default.as_ref().filter(|_| kind.is_some()) else {
        return;
    };
    match (parameter.kind.read(default), &parameter.choices) {
        (None, _) => faults.add(format!(
            "`{place}.default` must be {}.",
            parameter.kind.wanted()
        )),
        (Some(default), Some(choices)) if !parameter.is_choice(choices, &default) => {
            faults.add(format!("`{place}.default` must be one of `enum`."));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
