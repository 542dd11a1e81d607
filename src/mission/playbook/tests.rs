use proptest::prelude::*;
use serde_json::json;

use super::*;

fn body() -> Value {
    json!({
        "name": "bug-fix", "description": "Fix one issue",
        "mission": {"tasks": [{"title": "Fix {{issue}}", "description": "{{ issue }} by {{\tauthor }}", "priority": "{{level}}", "sideEffects": "{{careful}}"}]},
        "parameters": [
            {"name": "issue", "description": "What is broken", "required": true},
            {"name": "level", "description": "How urgent", "type": "number", "default": 5, "enum": [1, 5, 2.5]},
            {"name": "careful", "description": "Ask first", "type": "boolean"},
            {"name": "author", "description": "Who"},
        ],
        "version": "1", "author": "noor", "tags": ["code"], "extra": 1,
    })
}

fn playbook() -> Playbook {
    Playbook::parse(&body()).unwrap()
}

fn fill(params: &Value) -> Result<Filled, Vec<String>> {
    playbook().fill(params.as_object().unwrap())
}

#[test]
fn a_playbook_reads_back_as_it_is_written() {
    let playbook = playbook();
    let again = Playbook::parse(&json!(playbook)).unwrap();
    assert_eq!(again, playbook);
    let mut with_text = body();
    with_text["mission"] = json!(body()["mission"].to_string());
    assert_eq!(Playbook::parse(&with_text).unwrap(), playbook);
    let least = json!({"name": "a", "description": "b", "mission": {"tasks": []}});
    let least = json!(Playbook::parse(&least).unwrap());
    assert_eq!(
        least,
        json!({"name": "a", "description": "b", "mission": {"tasks": []}, "parameters": []})
    );
}

#[test]
fn each_fault_is_named() {
    let parameter = |members: Value| {
        let mut parameter = json!({"name": "p", "description": "d"});
        parameter
            .as_object_mut()
            .unwrap()
            .extend(members.as_object().unwrap().clone());
        json!({"parameters": [parameter]})
    };
    for (change, part) in [
        (json!({"name": null}), "`name`"),
        (json!({"name": ""}), "`name`"),
        (json!({"name": "Bug-Fix"}), "`name`"),
        (json!({"name": "bug_fix"}), "`name`"),
        (json!({"name": "bug--fix"}), "`name`"),
        (json!({"name": "-bug"}), "`name`"),
        (json!({"name": "bug-"}), "`name`"),
        (json!({"name": "bug fix"}), "`name`"),
        (json!({"name": "a".repeat(65)}), "`name`"),
        (json!({"name": 7}), "`name`"),
        (json!({"description": null}), "`description` is required"),
        (json!({"description": ""}), "`description` must be"),
        (json!({"description": 7}), "`description` must be"),
        (
            json!({"description": "x".repeat(2001)}),
            "`description` must be",
        ),
        (json!({"mission": null}), "`mission`"),
        (json!({"mission": {}}), "`mission`"),
        (json!({"mission": []}), "`mission`"),
        (json!({"mission": "not json"}), "`mission`"),
        (json!({"mission": "[]"}), "`mission`"),
        (json!({"mission": {"x": "x".repeat(1024 * 1024)}}), "1 MiB"),
        (json!({"version": 1}), "`version`"),
        (json!({"author": []}), "`author`"),
        (json!({"tags": "code"}), "`tags`"),
        (json!({"tags": [1]}), "`tags`"),
        (json!({"tags": [""]}), "`tags`"),
        (json!({"tags": vec!["t"; 51]}), "`tags`"),
        (json!({"parameters": {}}), "`parameters`"),
        (json!({"parameters": vec![json!({}); 51]}), "at most 50"),
        (
            json!({"parameters": [7]}),
            "`parameters[0]` must be an object",
        ),
        (
            json!({"parameters": [{"name": "p", "description": "d"}, {"name": "p", "description": "d"}]}),
            "`parameters[1].name` \"p\" occurs twice",
        ),
        (
            parameter(json!({"enum": vec!["x".repeat(2000); 40]})),
            "64 KiB",
        ),
        (parameter(json!({"name": null})), "`parameters[0].name`"),
        (parameter(json!({"name": "a b"})), "`parameters[0].name`"),
        (
            parameter(json!({"name": "p".repeat(65)})),
            "`parameters[0].name`",
        ),
        (
            parameter(json!({"description": null})),
            "`parameters[0].description` is required",
        ),
        (parameter(json!({"type": "date"})), "`parameters[0].type`"),
        (
            parameter(json!({"required": "yes"})),
            "`parameters[0].required`",
        ),
        (parameter(json!({"default": []})), "`parameters[0].default`"),
        (
            parameter(json!({"default": "many", "type": "number"})),
            "`parameters[0].default`",
        ),
        (
            parameter(json!({"default": "maybe", "type": "boolean"})),
            "`parameters[0].default`",
        ),
        (
            parameter(json!({"default": "c", "enum": ["a", "b"]})),
            "`parameters[0].default` must be one of",
        ),
        (parameter(json!({"enum": "a"})), "`parameters[0].enum`"),
        (parameter(json!({"enum": []})), "`parameters[0].enum`"),
        (parameter(json!({"enum": [{}]})), "`parameters[0].enum`"),
        (
            parameter(json!({"enum": ["x"], "type": "number"})),
            "`parameters[0].enum`",
        ),
        (
            parameter(json!({"enum": vec![1; 51], "type": "number"})),
            "`parameters[0].enum`",
        ),
    ] {
        let mut body = body();
        body.as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        let faults = Playbook::parse(&body).unwrap_err();
        assert_eq!(faults.len(), 1, "{part}: {faults:?}");
        assert!(faults[0].contains(part), "{part}: {faults:?}");
    }
    for body in [json!([]), json!("x"), Value::Null] {
        assert_eq!(
            Playbook::parse(&body),
            Err(vec!["The playbook must be an object.".to_owned()])
        );
    }
}

#[test]
fn all_faults_are_told_at_once_and_not_without_end() {
    let body = json!({"name": "N", "mission": 7, "parameters": [{"type": "x"}], "tags": 1});
    let faults = Playbook::parse(&body).unwrap_err();
    assert_eq!(faults.len(), 7, "{faults:?}");
    let body = json!({"parameters": vec![json!({"type": 1, "required": 1}); 50]});
    assert_eq!(Playbook::parse(&body).unwrap_err().len(), 50);
}

#[test]
fn a_filled_mission_has_its_values_in_place() {
    let filled = fill(&json!({"issue": "crash", "careful": "YES", "level": "2.5"})).unwrap();
    let task = &filled.mission["tasks"][0];
    let expected = json!({"title": "Fix crash", "description": "crash by ", "priority": 2.5, "sideEffects": true});
    assert_eq!(*task, expected);
    assert_eq!(
        filled.summary,
        "playbook:bug-fix (issue=crash, level=2.5, careful=true)"
    );
    assert_eq!(filled.warnings, [""; 0]);

    let filled =
        fill(&json!({"issue": 7, "careful": "", "author": null, "colour": "red"})).unwrap();
    let task = &filled.mission["tasks"][0];
    let expected =
        json!({"title": "Fix 7", "description": "7 by ", "priority": 5, "sideEffects": ""});
    assert_eq!(*task, expected);
    assert_eq!(filled.summary, "playbook:bug-fix (issue=7, level=5)");
    assert_eq!(filled.warnings, ["Unknown parameter: colour"]);

    let least = json!({"name": "a", "description": "b", "mission": {"tasks": []}});
    let filled = Playbook::parse(&least).unwrap().fill(&Map::new()).unwrap();
    assert_eq!(filled.summary, "playbook:a");
    // A long value is not repeated in full.
    let filled = fill(&json!({"issue": "é".repeat(5000)})).unwrap();
    assert!(filled.summary.chars().count() < 300, "{}", filled.summary);
}

#[test]
fn values_are_read_by_their_type() {
    use ParameterType as Type;
    for (kind, given, read) in [
        (Type::String, json!("x"), Some(json!("x"))),
        (Type::String, json!(1.5), Some(json!("1.5"))),
        (Type::String, json!(true), Some(json!("true"))),
        (Type::String, json!([]), None),
        (Type::String, json!({}), None),
        (Type::Number, json!(3), Some(json!(3))),
        (Type::Number, json!("3"), Some(json!(3))),
        (Type::Number, json!(" -3.25 "), Some(json!(-3.25))),
        (Type::Number, json!("1e3"), Some(json!(1000.0))),
        (Type::Number, json!("3 apples"), None),
        (Type::Number, json!(" "), None),
        (Type::Number, json!("NaN"), None),
        (Type::Number, json!("inf"), None),
        (Type::Number, json!("1e999"), None),
        (Type::Number, json!("0x10"), None),
        (Type::Number, json!(true), None),
        (Type::Boolean, json!(true), Some(json!(true))),
        (Type::Boolean, json!("True"), Some(json!(true))),
        (Type::Boolean, json!("yes"), Some(json!(true))),
        (Type::Boolean, json!("1"), Some(json!(true))),
        (Type::Boolean, json!(1), Some(json!(true))),
        (Type::Boolean, json!("FALSE"), Some(json!(false))),
        (Type::Boolean, json!("No"), Some(json!(false))),
        (Type::Boolean, json!(0), Some(json!(false))),
        (Type::Boolean, json!("2"), None),
        (Type::Boolean, json!("on"), None),
        (Type::Boolean, Value::Null, None),
    ] {
        assert_eq!(kind.read(&given), read, "{kind:?} {given}");
    }
}

#[test]
fn everything_wrong_with_a_run_is_told_at_once() {
    let mut body = body();
    body["mission"]["tasks"][0]["assignTo"] = json!("{{agent}} or {{ agent }}");
    let playbook = Playbook::parse(&body).unwrap();
    let faults = playbook.fill(
        json!({"issue": "", "level": "3", "careful": "maybe", "author": []})
            .as_object()
            .unwrap(),
    );
    assert_eq!(
        faults.unwrap_err(),
        [
            "issue is required",
            "level must be one of: 1, 5, 2.5",
            "careful must be a boolean (true, false, 1, 0, yes or no)",
            "author must be a string",
            "{{agent}} has no parameter: declare \"agent\" in `parameters`",
        ]
    );
    // A choice may be written in another way than in the playbook.
    assert!(fill(&json!({"issue": "x", "level": "5.0"})).is_ok());
    assert!(fill(&json!({"issue": "x", "level": 1.0})).is_ok());
}

fn one(text: &Value, value: &str) -> Result<Value, Vec<String>> {
    let body = json!({"name": "one", "description": "d", "mission": {"{{x}}": text},
        "parameters": [{"name": "x", "description": "d"}, {"name": "y", "description": "d", "default": "secret"}]});
    let given = json!({"x": value});
    let filled = Playbook::parse(&body)
        .unwrap()
        .fill(given.as_object().unwrap())?;
    // Keys stay as they are.
    Ok(filled.mission["{{x}}"].clone())
}

#[test]
fn only_placeholders_are_replaced() {
    for (text, filled) in [
        ("{{x}}", "V"),
        ("{{ x }}{{\n x}}", "VV"),
        ("a{{x}}b{{y}}c", "aVbsecretc"),
        ("{{{x}}}", "{V}"),
        ("{ {x} }", "{ {x} }"),
        ("{{x}", "{{x}"),
        ("{{}}", "{{}}"),
        ("{{ }}", "{{ }}"),
        ("{{x y}}", "{{x y}}"),
        ("{{x.y}}", "{{x.y}}"),
        ("{{#if x}}", "{{#if x}}"),
        ("{{{{x}}}}", "{{V}}"),
        ("é{{x}}é", "éVé"),
        ("{{é}}", "{{é}}"),
        ("{{", "{{"),
        ("", ""),
    ] {
        assert_eq!(one(&json!(text), "V"), Ok(json!(filled)), "{text}");
    }
    let nested = json!([1, null, true, ["{{x}}"], {"{{y}}": "{{x}}"}]);
    let filled = json!([1, null, true, ["V"], {"{{y}}": "V"}]);
    assert_eq!(one(&nested, "V"), Ok(filled));
}

#[test]
fn a_mission_cannot_be_blown_up() {
    let text = json!("{{x}}".repeat(10_000));
    let faults = one(&text, &"v".repeat(100_000)).unwrap_err();
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(faults[0].contains("4 MiB"), "{faults:?}");
    // Nor does it take long to find that there is no placeholder.
    assert!(one(&json!("{{ ".repeat(300_000)), "v").is_ok());
    assert!(one(&json!("{".repeat(900_000)), "v").is_ok());
}

proptest! {
    /// Whatever a value is, the text around it stays and the value stands there as it was given.
    #[test]
    fn no_value_is_taken_for_a_placeholder(
        value in "[{}xy \\\\a\"]{1,20}|\\{\\{ ?[xyz] ?\\}\\}", before in "[{}a ]{0,4}", after in "[{}a ]{0,4}",
    ) {
        let text = json!(format!("{before} {{{{x}}}} {after}"));
        prop_assert_eq!(one(&text, &value), Ok(json!(format!("{before} {value} {after}"))));
        prop_assert_eq!(one(&json!("{{x}}"), &value), Ok(json!(value)));
    }
}
