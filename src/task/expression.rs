//! Conditions: CEL over `data`, `task` and `mission` (design 0.1), as much of it as ends soon whatever it is given.

use cel::common::ast::{ComprehensionExpr, EntryExpr, Expr, operators};
use cel::{IdedExpr, Program};
use serde_json::Value;

/// The longest expression, in bytes.
const LONGEST: usize = 2048;
/// How deep its parts may stand in each other.
const DEEPEST: usize = 100;
/// Of a list that comes from a list, so many: `a.filter(…).exists(…)` is two.
const IN_A_ROW: usize = 2;

/// What expressions can name.
const VARIABLES: [&str; 3] = ["data", "task", "mission"];

/// Checks that a text is an expression, and one that is soon evaluated: a tenant's condition must not keep the server
/// busy. So no list is walked for each element of another, and none grows on the way.
///
/// # Errors
/// What is wrong with it; ends a sentence.
pub fn check_expression(expression: &str) -> Result<(), String> {
    compile(expression).map(drop)
}

/// Whether an expression holds where `context` has its variables as members.
///
/// # Errors
/// Why it cannot be told; ends a sentence.
pub fn holds(expression: &str, context: &Value) -> Result<bool, String> {
    let program = compile(expression)?;
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

fn compile(expression: &str) -> Result<Program, String> {
    if expression.len() > LONGEST {
        return Err(format!("it is longer than {LONGEST} bytes"));
    }
    let program = Program::compile(expression).map_err(|error| {
        let reason = error.to_string();
        let line = reason.lines().next().unwrap_or_default();
        format!("it is not CEL: {line}")
    })?;
    measure(program.expression(), 0, 0, false)?;
    Ok(program)
}

/// Follows an expression down to its leaves. `row` counts the lists that this one is walked for, and `walked` says whether
/// it is looked at for each element of one.
fn measure(expression: &IdedExpr, depth: usize, row: usize, walked: bool) -> Result<(), String> {
    if depth > DEEPEST {
        return Err("its parts stand too deep in each other".to_owned());
    }
    let below = |part: &IdedExpr| measure(part, depth + 1, row, walked);
    match &expression.expr {
        Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) => Ok(()),
        Expr::Call(call) => call
            .target
            .as_deref()
            .into_iter()
            .chain(&call.args)
            .try_for_each(below),
        Expr::List(list) => list.elements.iter().try_for_each(below),
        Expr::Select(select) => below(&select.operand),
        Expr::Map(map) => map
            .entries
            .iter()
            .try_for_each(|entry| parts(&entry.expr, &below)),
        Expr::Struct(made) => made
            .entries
            .iter()
            .try_for_each(|entry| parts(&entry.expr, &below)),
        Expr::Comprehension(walk) => comprehension(walk, depth, row, walked),
    }
}

fn parts(
    entry: &EntryExpr,
    below: &impl Fn(&IdedExpr) -> Result<(), String>,
) -> Result<(), String> {
    match entry {
        EntryExpr::StructField(field) => below(&field.value),
        EntryExpr::MapEntry(entry) => below(&entry.key).and_then(|()| below(&entry.value)),
    }
}

fn comprehension(
    walk: &ComprehensionExpr,
    depth: usize,
    row: usize,
    walked: bool,
) -> Result<(), String> {
    if walked {
        return Err("it walks a list for each element of another".to_owned());
    }
    if row >= IN_A_ROW {
        return Err(format!("it walks more than {IN_A_ROW} lists in a row"));
    }
    // What makes a list adds each element to it by one `+`: another is the expression's own.
    let makes_a_list = matches!(walk.accu_init.expr, Expr::List(_));
    if makes_a_list && additions(&walk.loop_step) > 1 {
        return Err("it adds something up for each element of a list".to_owned());
    }
    measure(&walk.iter_range, depth + 1, row + 1, walked)?;
    for part in [
        &walk.accu_init,
        &walk.loop_cond,
        &walk.loop_step,
        &walk.result,
    ] {
        measure(part, depth + 1, row, true)?;
    }
    Ok(())
}

/// How often an expression adds. What stands too deep is not counted: it is refused.
fn additions(expression: &IdedExpr) -> usize {
    match &expression.expr {
        Expr::Call(call) => {
            let here = usize::from(call.func_name == operators::ADD);
            let parts = call.target.as_deref().into_iter().chain(&call.args);
            here + parts.map(additions).sum::<usize>()
        }
        Expr::List(list) => list.elements.iter().map(additions).sum(),
        Expr::Select(select) => additions(&select.operand),
        Expr::Map(map) => map.entries.iter().map(|entry| of_entry(&entry.expr)).sum(),
        Expr::Struct(made) => made.entries.iter().map(|entry| of_entry(&entry.expr)).sum(),
        Expr::Comprehension(walk) => additions(&walk.iter_range),
        Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) => 0,
    }
}

fn of_entry(entry: &EntryExpr) -> usize {
    match entry {
        EntryExpr::StructField(field) => additions(&field.value),
        EntryExpr::MapEntry(entry) => additions(&entry.key) + additions(&entry.value),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_expression_that_could_take_for_ever_is_refused() {
        let many = format!("[{}]", vec!["0"; 200].join(","));
        let nested = format!("{many}.all(a, {many}.all(b, {many}.all(c, {many}.all(d, true))))");
        let deep = format!("{}1 == 1", "1 + ".repeat(500));
        let doubled = format!("['a']{} == []", ".map(x, x + x)".repeat(100));
        let row = format!("[1]{} == []", ".map(x, [x, x])".repeat(100));
        for (expression, word) in [
            (nested.as_str(), "for each element"),
            (
                "data.a.map(x, data.a.filter(y, y == x)) == []",
                "for each element",
            ),
            (doubled.as_str(), "adds something up"),
            ("['a'].map(x, x + x) == []", "adds something up"),
            (row.as_str(), "in a row"),
            (deep.as_str(), "too deep"),
            ("task.", "not CEL"),
            (&"1".repeat(2049), "longer"),
        ] {
            let refused = check_expression(expression).unwrap_err();
            assert!(refused.contains(word), "{expression:.60}: {refused}");
            assert!(holds(expression, &json!({})).is_err());
        }
    }

    #[test]
    fn what_people_write_is_evaluated() {
        let context = json!({"data": {"a": [1, 2, 3]}, "task": {"tags": ["x", "y"], "title": "T"}, "mission": {}});
        for (expression, expected) in [
            (
                "data.a.exists(n, n > 2) && task.tags.all(tag, tag != 'z')",
                true,
            ),
            ("data.a.filter(n, n > 1).exists(n, n == 1)", false),
            ("data.a.map(n, [n]).size() == 3", true),
            ("task.title + '!' == 'T!' && 'x' in task.tags", true),
            ("has(task.nothing) || task.title.startsWith('T')", true),
            ("data.a.exists_one(n, n == 2)", true),
        ] {
            assert_eq!(holds(expression, &context), Ok(expected), "{expression}");
        }
    }
}
