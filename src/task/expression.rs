//! Conditions: CEL over `data`, `task` and `mission` (design 0.1), as much of it as ends soon whatever it is given.

use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, LiteralValue, operators};
use cel::{ExecutionError, IdedExpr, Program};
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

/// Checks that an expression can be evaluated and can be true or false, as far as that can be told without values: a gate whose
/// condition never can stops every task. What is stored already is not asked this.
///
/// # Errors
/// What is wrong with it; ends a sentence.
pub(super) fn check_meaning(expression: &str) -> Result<(), String> {
    let program = compile(expression)?;
    let nothing = cel::Context::default();
    check_names(program.expression(), &[], &nothing)?;
    let depends = program
        .references()
        .variables()
        .iter()
        .any(|name| is_variable(name));
    if depends {
        return Ok(());
    }
    match program.execute(&nothing) {
        Ok(cel::Value::Bool(_)) => Ok(()),
        Ok(other) => Err(format!(
            "it is always of the type {}, and never true or false",
            other.type_of()
        )),
        // What is wrong with it is said in words of the library's own.
        Err(_) => Err("it can never be evaluated".to_owned()),
    }
}

/// A leading dot makes a name one of the outermost.
fn is_variable(name: &str) -> bool {
    VARIABLES.contains(&name.trim_start_matches('.'))
}

/// Checks that everything that an expression names is there. `bound` are the names that the macros around it give to elements.
/// What there is besides, such as types, `context` is asked.
fn check_names(
    expression: &IdedExpr,
    bound: &[&str],
    context: &cel::Context<'_, '_>,
) -> Result<(), String> {
    let below = |part: &IdedExpr| check_names(part, bound, context);
    match &expression.expr {
        Expr::Unspecified | Expr::Literal(_) => Ok(()),
        Expr::Ident(name) => check_name(name, expression, bound, context),
        Expr::Select(select) => match root(expression) {
            Some(name) => check_name(name, expression, bound, context),
            None => below(&select.operand),
        },
        Expr::Call(call) => {
            let target = call.target.as_deref();
            let name = &call.func_name;
            // `optional.of(…)` has no value before its dot: all of it is the function's name.
            let is_qualified = target
                .and_then(spelled)
                .is_some_and(|before| is_function(&format!("{before}.{name}"), false, context));
            if !is_qualified {
                if !is_operator(name) && !is_function(name, target.is_some(), context) {
                    return Err(format!("there is no function `{name}`"));
                }
                target.into_iter().try_for_each(below)?;
            }
            call.args.iter().try_for_each(below)
        }
        Expr::List(list) => list.elements.iter().try_for_each(below),
        Expr::Map(map) => map
            .entries
            .iter()
            .try_for_each(|entry| parts(&entry.expr, &below)),
        Expr::Struct(made) => made
            .entries
            .iter()
            .try_for_each(|entry| parts(&entry.expr, &below)),
        Expr::Comprehension(walk) => {
            below(&walk.iter_range)?;
            below(&walk.accu_init)?;
            let mut inside = bound.to_vec();
            inside.extend([walk.iter_var.as_str(), walk.accu_var.as_str()]);
            inside.extend(walk.iter_var2.as_deref());
            [&walk.loop_cond, &walk.loop_step, &walk.result]
                .into_iter()
                .try_for_each(|part| check_names(part, &inside, context))
        }
    }
}

/// `whole` is the name with what is selected of it: `google` alone is nothing, `google.protobuf.Timestamp` is a type.
fn check_name(
    name: &str,
    whole: &IdedExpr,
    bound: &[&str],
    context: &cel::Context<'_, '_>,
) -> Result<(), String> {
    // Nobody can write an `@`: it marks what macros are made of.
    let is_there = name.starts_with('@')
        || bound.contains(&name)
        || is_variable(name)
        || !is_undeclared(whole, context);
    if is_there {
        return Ok(());
    }
    Err(format!(
        "there is no `{name}`, only `data`, `task` and `mission`"
    ))
}

/// The name that `a.b.c` begins with.
fn root(expression: &IdedExpr) -> Option<&str> {
    match &expression.expr {
        Expr::Ident(name) => Some(name),
        Expr::Select(select) => root(&select.operand),
        _ => None,
    }
}

/// `a.b.c`, if an expression is nothing else.
fn spelled(expression: &IdedExpr) -> Option<String> {
    match &expression.expr {
        Expr::Ident(name) => Some(name.clone()),
        Expr::Select(select) if !select.test => {
            Some(format!("{}.{}", spelled(&select.operand)?, select.field))
        }
        _ => None,
    }
}

/// The parser names operators by signs that no function's name can have, such as `_+_`.
fn is_operator(name: &str) -> bool {
    !name
        .chars()
        .all(|sign| sign.is_alphanumeric() || "_.".contains(sign))
}

/// Whether there is a function of this name, of whatever arguments: a call without any tells one that does not fit from one that
/// is not there.
fn is_function(name: &str, of_value: bool, context: &cel::Context<'_, '_>) -> bool {
    let value = || {
        Box::new(IdedExpr {
            id: 0,
            expr: Expr::Literal(LiteralValue::Null),
        })
    };
    let call = CallExpr {
        func_name: name.to_owned(),
        target: of_value.then(value),
        args: Vec::new(),
    };
    let call = IdedExpr {
        id: 0,
        expr: Expr::Call(call),
    };
    !is_undeclared(&call, context)
}

fn is_undeclared(expression: &IdedExpr, context: &cel::Context<'_, '_>) -> bool {
    matches!(
        cel::Value::resolve(expression, context),
        Err(ExecutionError::UndeclaredReference(_))
    )
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
            assert_eq!(check_meaning(expression), Ok(()), "{expression}");
        }
    }

    #[test]
    fn what_can_never_be_true_or_false_is_refused_and_what_can_is_not() {
        for (expression, word) in [
            ("unknownvar == 1", "`unknownvar`"),
            ("has(unknown.member)", "`unknown`"),
            ("data.a.exists(n, m > 1)", "`m`"),
            ("data.a.exists(n, n > 1) && n > 1", "`n`"),
            ("nosuchfn(task)", "`nosuchfn`"),
            ("task.title.nosuchfn()", "`nosuchfn`"),
            ("1", "type int"),
            ("\"x\"", "type string"),
            ("1 + 1", "type int"),
            ("[true]", "type list"),
            ("1 / 0 == 1", "never be evaluated"),
            ("task.", "not CEL"),
        ] {
            let refused = check_meaning(expression).unwrap_err();
            assert!(refused.contains(word), "{expression}: {refused}");
        }
        for expression in [
            "true",
            "1 < 2",
            "data",
            "data.flag",
            ".data.a.size() == 3",
            "size(data.a) > 0",
            "type(task.title) == string",
            "int(data.n) + 1 == 2",
            "has(data.a) ? data.a[0] > 1 : mission.name != ''",
            "!task.done && -data.n < 0 && data.n in [1, 2]",
            "{'a': data.n}.a == 1",
            "data.a.map(n, n > 1, n) == []",
            "data.a.filter(task, task > 1).all(data, data > 1)",
            "task.outcomes.exists_one(one, one.label.contains('a'))",
            "timestamp(task.createdAt) < timestamp('2026-01-01T00:00:00Z')",
        ] {
            assert_eq!(check_meaning(expression), Ok(()), "{expression}");
        }
    }
}
