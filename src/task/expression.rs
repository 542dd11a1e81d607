//! Conditions: CEL over `data`, `task` and `mission` (design 0.1).

use serde_json::Value;

/// The longest expression, in bytes.
const LONGEST: usize = 2048;

/// What expressions can name.
const VARIABLES: [&str; 3] = ["data", "task", "mission"];

/// Checks that a text is an expression.
///
/// # Errors
/// What is wrong with it; ends a sentence.
pub fn check_expression(expression: &str) -> Result<(), String> {
    if expression.len() > LONGEST {
        return Err(format!("it is longer than {LONGEST} bytes"));
    }
    match cel::Program::compile(expression) {
        Ok(_) => Ok(()),
        Err(error) => {
            let reason = error.to_string();
            let line = reason.lines().next().unwrap_or_default();
            Err(format!("it is not CEL: {line}"))
        }
    }
}

/// Whether an expression holds where `context` has its variables as members.
///
/// # Errors
/// Why it cannot be told; ends a sentence.
pub fn holds(expression: &str, context: &Value) -> Result<bool, String> {
    let program = cel::Program::compile(expression).map_err(|error| error.to_string())?;
    let mut variables = cel::Context::default();
    for name in VARIABLES {
        variables
            .add_variable(name, &context[name])
            .map_err(|error| error.to_string())?;
    }
    match program.execute(&variables) {
        Ok(cel::Value::Bool(holds)) => Ok(holds),
        Ok(other) => Err(format!("it is {:?} and not true or false", other.type_of())),
        Err(error) => Err(error.to_string()),
    }
}
