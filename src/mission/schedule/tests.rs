use proptest::prelude::*;

use super::*;

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn cron(expression: &str, zone: &str) -> Timing {
    Timing::parse(expression, Some(zone), true).unwrap()
}

/// The next occurrences as `day hour:minute` of UTC.
fn next(timing: &Timing, now: &str, count: usize) -> Vec<String> {
    let found = timing.upcoming(at(now), None, count);
    found
        .iter()
        .map(|at| at.format("%m-%d %H:%M").to_string())
        .collect()
}

#[test]
fn expressions_mean_what_the_contract_says() {
    let now = "2026-04-07T13:00:00Z";
    for (expression, expected) in [
        (
            "30 6 * * 1-5",
            ["04-08 06:30", "04-09 06:30", "04-10 06:30", "04-13 06:30"],
        ),
        (
            "*/20 13 * * *",
            ["04-07 13:20", "04-07 13:40", "04-08 13:00", "04-08 13:20"],
        ),
        (
            "0 0 1-10/4 * *",
            ["04-09 00:00", "05-01 00:00", "05-05 00:00", "05-09 00:00"],
        ),
        (
            "5,10 1,2 * * *",
            ["04-08 01:05", "04-08 01:10", "04-08 02:05", "04-08 02:10"],
        ),
        (
            "0 0 * * 0",
            ["04-12 00:00", "04-19 00:00", "04-26 00:00", "05-03 00:00"],
        ),
        (
            "0 0 * * 7",
            ["04-12 00:00", "04-19 00:00", "04-26 00:00", "05-03 00:00"],
        ),
        (
            "0 0 * * 6-7",
            ["04-11 00:00", "04-12 00:00", "04-18 00:00", "04-19 00:00"],
        ),
        // Day and weekday: both must match.
        (
            "0 0 13 * 5",
            ["11-13 00:00", "08-13 00:00", "10-13 00:00", "04-13 00:00"],
        ),
        (
            "0 0 */2 * */2",
            ["04-09 00:00", "04-11 00:00", "04-19 00:00", "04-21 00:00"],
        ),
        (
            "00 09 08 04 03",
            ["04-08 09:00", "04-08 09:00", "04-08 09:00", "04-08 09:00"],
        ),
        (
            "  0   12\t*  * * ",
            ["04-08 12:00", "04-09 12:00", "04-10 12:00", "04-11 12:00"],
        ),
        (
            "59 23 31 12 *",
            ["12-31 23:59", "12-31 23:59", "12-31 23:59", "12-31 23:59"],
        ),
        (
            "0 0 29 2 *",
            ["02-29 00:00", "02-29 00:00", "02-29 00:00", "02-29 00:00"],
        ),
    ] {
        let timing = Timing::parse(expression, None, true).unwrap();
        assert_eq!(next(&timing, now, 4), expected, "{expression}");
    }
    // The rarest: it waits for 2044.
    let rare = cron("0 0 29 2 1", "UTC");
    assert_eq!(rare.next_after(at(now)), Some(at("2044-02-29T00:00:00Z")));
    let parsed = cron(" 0  6 * * * ", "Europe/Berlin");
    let Timing::Cron(parsed) = parsed else {
        panic!("{parsed:?}")
    };
    assert_eq!(
        (parsed.expression(), parsed.zone()),
        ("0 6 * * *", "Europe/Berlin")
    );
    // An occurrence is strictly after now, whatever the fraction of a second.
    let hourly = cron("0 * * * *", "UTC");
    for (now, expected) in [
        ("2026-04-07T13:00:00Z", "2026-04-07T14:00:00Z"),
        ("2026-04-07T13:59:59.999999999Z", "2026-04-07T14:00:00Z"),
        ("2026-04-07T14:00:00.000000001Z", "2026-04-07T15:00:00Z"),
    ] {
        assert_eq!(hourly.next_after(at(now)), Some(at(expected)), "{now}");
    }
}

#[test]
fn what_is_no_expression_is_refused_with_a_sentence() {
    for (expression, zone, recurring, parameter, part) in [
        ("", None, true, "expression", "has 0 fields"),
        ("* * * *", None, true, "expression", "has 4 fields"),
        ("0 * * * * *", None, true, "expression", "has 6 fields"),
        ("@daily", None, true, "expression", "has 1 fields"),
        ("60 * * * *", None, true, "expression", "minute"),
        ("* 24 * * *", None, true, "expression", "hour"),
        ("* * 0 * *", None, true, "expression", "day of the month"),
        ("* * 32 * *", None, true, "expression", "day of the month"),
        ("* * * 13 *", None, true, "expression", "month"),
        ("* * * * 8", None, true, "expression", "weekday"),
        ("0 0 * JAN *", None, true, "expression", "month"),
        ("0 0 * * MON", None, true, "expression", "weekday"),
        ("0 0 L * *", None, true, "expression", "day of the month"),
        ("0 0 15W * *", None, true, "expression", "day of the month"),
        ("0 0 * * 5#2", None, true, "expression", "weekday"),
        ("0 0 * * 5L", None, true, "expression", "weekday"),
        ("0 0 * * +5", None, true, "expression", "weekday"),
        ("0 0 ? * *", None, true, "expression", "day of the month"),
        ("5/10 * * * *", None, true, "expression", "minute"),
        ("/10 * * * *", None, true, "expression", "minute"),
        ("*/0 * * * *", None, true, "expression", "minute"),
        ("*/60 * * * *", None, true, "expression", "minute"),
        ("*/5/5 * * * *", None, true, "expression", "minute"),
        ("1-2-3 * * * *", None, true, "expression", "minute"),
        ("5-1 * * * *", None, true, "expression", "minute"),
        ("1, * * * *", None, true, "expression", "minute"),
        (",1 * * * *", None, true, "expression", "minute"),
        ("*,1 * * * *", None, true, "expression", "minute"),
        ("** * * * *", None, true, "expression", "minute"),
        ("-1 * * * *", None, true, "expression", "minute"),
        ("001 * * * *", None, true, "expression", "minute"),
        ("٣ * * * *", None, true, "expression", "minute"),
        ("0 0 31 2 *", None, true, "expression", "never matches"),
        ("0 0 30 2 1", None, false, "expression", "never matches"),
        (
            "0 0 31 4,6,9,11 *",
            None,
            true,
            "expression",
            "never matches",
        ),
        ("0 0 * * *", Some(""), true, "timezone", "IANA"),
        ("0 0 * * *", Some("Mars/Olympus"), true, "timezone", "IANA"),
        ("0 0 * * *", Some("+02:00"), true, "timezone", "IANA"),
        (
            "2026-04-08T06:30:00Z",
            Some("nowhere"),
            false,
            "timezone",
            "IANA",
        ),
        (
            "2026-04-08T06:30:00Z",
            None,
            true,
            "expression",
            "must be cron",
        ),
        ("2026-04-08", None, false, "expression", "a timestamp like"),
        (
            "2026-02-30T06:30:00Z",
            None,
            false,
            "expression",
            "a timestamp like",
        ),
        (
            "2026-04-08T25:30:00Z",
            None,
            false,
            "expression",
            "a timestamp like",
        ),
        (
            "2026-04-08T06:30:00 Mars",
            None,
            false,
            "expression",
            "a timestamp like",
        ),
        ("tomorrow", None, false, "expression", "has 1 fields"),
    ] {
        let error = Timing::parse(expression, zone, recurring).unwrap_err();
        assert_eq!(error.parameter, parameter, "{expression}: {error}");
        assert!(error.message.contains(part), "{expression}: {error}");
    }
    let long = format!("{} * * * *", "1,".repeat(200));
    assert!(
        Timing::parse(&long, None, true)
            .unwrap_err()
            .message
            .contains("256 bytes")
    );
}

#[test]
fn an_expression_that_only_ever_falls_into_gaps_has_no_next_and_says_so_soon() {
    // The last Sunday of March at two, every five minutes: the clock of Berlin never shows it.
    let never = cron("*/5 2 25-31 3 0", "Europe/Berlin");
    assert_eq!(never.next_after(at("2026-01-01T00:00:00Z")), None);
}

#[test]
fn a_timestamp_is_one_instant_and_a_cron_that_does_not_recur_its_next_match() {
    for (expression, zone, expected) in [
        ("2026-04-08T06:30:00Z", None, "2026-04-08T06:30:00Z"),
        ("2026-04-08T06:30Z", None, "2026-04-08T06:30:00Z"),
        ("2026-04-08T06:30:00.250Z", None, "2026-04-08T06:30:00.250Z"),
        (
            "2026-04-08T06:30:00+02:00",
            Some("America/New_York"),
            "2026-04-08T04:30:00Z",
        ),
        ("2026-04-08T06:30:00+0200", None, "2026-04-08T04:30:00Z"),
        ("2026-04-08T06:30:00", None, "2026-04-08T06:30:00Z"),
        (
            "2026-04-08T06:30",
            Some("Europe/Berlin"),
            "2026-04-08T04:30:00Z",
        ),
        // In a gap: its end. In a repeated hour: the first time.
        (
            "2026-03-29T02:30:05",
            Some("Europe/Berlin"),
            "2026-03-29T01:00:00Z",
        ),
        (
            "2026-10-25T02:30:00",
            Some("Europe/Berlin"),
            "2026-10-25T00:30:00Z",
        ),
    ] {
        let timing = Timing::parse(expression, zone, false);
        assert_eq!(timing, Ok(Timing::Once(at(expected))), "{expression}");
    }
    let once = Timing::Once(at("2026-04-08T06:30:00Z"));
    assert_eq!(next(&once, "2026-04-08T06:29:59Z", 5), ["04-08 06:30"]);
    assert_eq!(next(&once, "2026-04-08T06:30:00Z", 5), [""; 0]);
    assert!(Timing::parse("0 6 * * *", None, false).is_ok());
}

#[test]
fn upcoming_ends_before_the_end() {
    let hourly = cron("0 * * * *", "UTC");
    let end = Some(at("2026-04-07T15:00:00Z"));
    let found = hourly.upcoming(at("2026-04-07T13:30:00Z"), end, 5);
    assert_eq!(found, [at("2026-04-07T14:00:00Z")]);
}

/// Berlin skips 2:00 to 3:00 on 29 March 2026 and repeats it on 25 October, both at 1:00 UTC; New York skips 2:00 to
/// 3:00 on 8 March at 7:00 UTC and repeats 1:00 to 2:00 on 1 November at 6:00 UTC.
#[test]
fn times_of_day_run_once_on_days_when_the_clock_changes() {
    for (zone, expression, now, expected) in [
        // A skipped time is run at the end of the gap, and at its own time the day after.
        (
            "Europe/Berlin",
            "30 2 * * *",
            "2026-03-28T12:00:00Z",
            ["03-29 01:00", "03-30 00:30", "03-31 00:30"],
        ),
        (
            "America/New_York",
            "30 2 * * *",
            "2026-03-07T12:00:00Z",
            ["03-08 07:00", "03-09 06:30", "03-10 06:30"],
        ),
        // All times of one gap are run together, also with a time that is its end.
        (
            "Europe/Berlin",
            "0,30 2 * * *",
            "2026-03-28T12:00:00Z",
            ["03-29 01:00", "03-30 00:00", "03-30 00:30"],
        ),
        (
            "Europe/Berlin",
            "0 2,3 * * *",
            "2026-03-28T12:00:00Z",
            ["03-29 01:00", "03-30 00:00", "03-30 01:00"],
        ),
        (
            "Europe/Berlin",
            "0-59/20 2 * * *",
            "2026-03-29T00:59:59Z",
            ["03-29 01:00", "03-30 00:00", "03-30 00:20"],
        ),
        // Beside the gap nothing changes.
        (
            "Europe/Berlin",
            "0 1 * * *",
            "2026-03-28T12:00:00Z",
            ["03-29 00:00", "03-29 23:00", "03-30 23:00"],
        ),
        (
            "Europe/Berlin",
            "0 3 * * *",
            "2026-03-28T12:00:00Z",
            ["03-29 01:00", "03-30 01:00", "03-31 01:00"],
        ),
        (
            "Europe/Berlin",
            "30 2 29 3 0",
            "2026-03-01T12:00:00Z",
            ["03-29 01:00", "03-29 01:00", "03-29 01:00"],
        ),
        // A repeated time is run the first time only.
        (
            "Europe/Berlin",
            "30 2 * * *",
            "2026-10-24T12:00:00Z",
            ["10-25 00:30", "10-26 01:30", "10-27 01:30"],
        ),
        (
            "America/New_York",
            "30 1 * * *",
            "2026-10-31T12:00:00Z",
            ["11-01 05:30", "11-02 06:30", "11-03 06:30"],
        ),
        (
            "Europe/Berlin",
            "0,30 2 * * *",
            "2026-10-24T12:00:00Z",
            ["10-25 00:00", "10-25 00:30", "10-26 01:00"],
        ),
        (
            "Europe/Berlin",
            "30 2 * * *",
            "2026-10-25T00:30:00Z",
            ["10-26 01:30", "10-27 01:30", "10-28 01:30"],
        ),
        (
            "Europe/Berlin",
            "30 2 * * *",
            "2026-10-25T01:15:00Z",
            ["10-26 01:30", "10-27 01:30", "10-28 01:30"],
        ),
        (
            "Europe/Berlin",
            "0 3 * * *",
            "2026-10-24T12:00:00Z",
            ["10-25 02:00", "10-26 02:00", "10-27 02:00"],
        ),
    ] {
        let found = next(&cron(expression, zone), now, 3);
        assert_eq!(found, expected, "{zone} {expression} after {now}");
    }
}

#[test]
fn rhythms_go_on_in_real_time_when_the_clock_changes() {
    for (zone, expression, now, expected) in [
        (
            "Europe/Berlin",
            "*/15 * * * *",
            "2026-03-29T00:30:00Z",
            ["03-29 00:45", "03-29 01:00", "03-29 01:15"],
        ),
        (
            "Europe/Berlin",
            "*/15 * * * *",
            "2026-10-25T00:30:00Z",
            ["10-25 00:45", "10-25 01:00", "10-25 01:15"],
        ),
        (
            "Europe/Berlin",
            "0 * * * *",
            "2026-03-28T23:30:00Z",
            ["03-29 00:00", "03-29 01:00", "03-29 02:00"],
        ),
        (
            "Europe/Berlin",
            "0 * * * *",
            "2026-10-24T23:30:00Z",
            ["10-25 00:00", "10-25 01:00", "10-25 02:00"],
        ),
        (
            "America/New_York",
            "*/15 * * * *",
            "2026-03-08T06:30:00Z",
            ["03-08 06:45", "03-08 07:00", "03-08 07:15"],
        ),
        (
            "America/New_York",
            "*/15 * * * *",
            "2026-11-01T05:30:00Z",
            ["11-01 05:45", "11-01 06:00", "11-01 06:15"],
        ),
        (
            "America/New_York",
            "0 * * * *",
            "2026-03-08T05:30:00Z",
            ["03-08 06:00", "03-08 07:00", "03-08 08:00"],
        ),
        (
            "America/New_York",
            "0 * * * *",
            "2026-11-01T04:30:00Z",
            ["11-01 05:00", "11-01 06:00", "11-01 07:00"],
        ),
        // Within one hour of the day: not at all when it is skipped, in both halves when it is repeated.
        (
            "Europe/Berlin",
            "*/30 2 * * *",
            "2026-03-28T12:00:00Z",
            ["03-30 00:00", "03-30 00:30", "03-31 00:00"],
        ),
        (
            "Europe/Berlin",
            "*/30 2 * * *",
            "2026-10-25T00:00:00Z",
            ["10-25 00:30", "10-25 01:00", "10-25 01:30"],
        ),
        // Hours are those of the clock: two of them are three real hours apart, or one.
        (
            "Europe/Berlin",
            "0 */2 * * *",
            "2026-03-28T22:30:00Z",
            ["03-28 23:00", "03-29 02:00", "03-29 04:00"],
        ),
        (
            "Europe/Berlin",
            "0 */2 * * *",
            "2026-10-24T23:30:00Z",
            ["10-25 00:00", "10-25 01:00", "10-25 03:00"],
        ),
    ] {
        let found = next(&cron(expression, zone), now, 3);
        assert_eq!(found, expected, "{zone} {expression} after {now}");
    }
}

fn schedule(timing: Timing, due: &str) -> Schedule {
    Schedule {
        timing,
        recurring: true,
        enabled: true,
        end_date: None,
        due: Some(at(due)),
        catch_up: CatchUp::Latest,
        overlap: Overlap::Skip,
    }
}

#[test]
fn what_is_due_is_decided_once_for_all_that_is_due() {
    let hourly = || schedule(cron("0 * * * *", "UTC"), "2026-04-07T10:00:00Z");
    let skipping = || Schedule {
        catch_up: CatchUp::Skip,
        ..hourly()
    };
    let queueing = || Schedule {
        overlap: Overlap::Queue,
        ..hourly()
    };
    let ending = |end| Schedule {
        end_date: Some(at(end)),
        ..hourly()
    };
    let eleven = Some(at("2026-04-07T11:00:00Z"));
    let fire = |next| Decision::Fire { next };
    let skip = |reason, next| Decision::Skip { reason, next };
    use Standing::{Busy, Elsewhere, Ready};
    for (case, schedule, now, standing, expected) in [
        (
            "early",
            hourly(),
            "2026-04-07T09:59:59Z",
            Ready,
            Decision::Wait,
        ),
        ("due", hourly(), "2026-04-07T10:00:00Z", Ready, fire(eleven)),
        (
            "late",
            hourly(),
            "2026-04-07T10:01:00Z",
            Ready,
            fire(eleven),
        ),
        (
            "missed",
            hourly(),
            "2026-04-07T10:01:01Z",
            Ready,
            fire(eleven),
        ),
        (
            "many missed",
            hourly(),
            "2026-04-09T08:30:00Z",
            Ready,
            fire(Some(at("2026-04-09T09:00:00Z"))),
        ),
        (
            "not to be made up for",
            skipping(),
            "2026-04-07T10:01:01Z",
            Ready,
            skip(SkipReason::Missed, eleven),
        ),
        (
            "on time",
            skipping(),
            "2026-04-07T10:01:00Z",
            Ready,
            fire(eleven),
        ),
        (
            "the latest on time",
            skipping(),
            "2026-04-07T13:00:30Z",
            Ready,
            fire(Some(at("2026-04-07T14:00:00Z"))),
        ),
        (
            "under way",
            hourly(),
            "2026-04-07T10:00:00Z",
            Busy,
            skip(SkipReason::Overlap, eleven),
        ),
        (
            "to follow",
            queueing(),
            "2026-04-07T10:00:00Z",
            Busy,
            Decision::Queue { next: eleven },
        ),
        (
            "free",
            queueing(),
            "2026-04-07T10:00:00Z",
            Ready,
            fire(eleven),
        ),
        (
            "not waiting",
            queueing(),
            "2026-04-07T10:00:00Z",
            Elsewhere,
            skip(SkipReason::NotScheduled, eleven),
        ),
        (
            "disabled",
            Schedule {
                enabled: false,
                ..hourly()
            },
            "2026-04-07T10:00:00Z",
            Ready,
            Decision::Wait,
        ),
        (
            "disabled and over",
            Schedule {
                enabled: false,
                ..ending("2026-04-01T00:00:00Z")
            },
            "2026-04-07T10:00:00Z",
            Ready,
            Decision::Wait,
        ),
        (
            "never due",
            Schedule {
                due: None,
                ..hourly()
            },
            "2026-04-07T10:00:00Z",
            Ready,
            Decision::Wait,
        ),
        (
            "over",
            ending("2026-04-07T10:00:00Z"),
            "2026-04-07T10:00:00Z",
            Ready,
            Decision::Expire,
        ),
        (
            "over, not due",
            Schedule {
                due: None,
                ..ending("2026-04-07T10:00:00Z")
            },
            "2026-04-07T10:00:00Z",
            Busy,
            Decision::Expire,
        ),
        (
            "the last",
            ending("2026-04-07T11:00:00Z"),
            "2026-04-07T10:00:00Z",
            Ready,
            fire(None),
        ),
        (
            "not the last",
            ending("2026-04-07T11:00:00.001Z"),
            "2026-04-07T10:00:00Z",
            Ready,
            fire(eleven),
        ),
    ] {
        assert_eq!(schedule.decide(at(now), standing), expected, "{case}");
    }
}

#[test]
fn a_single_run_has_no_next() {
    for timing in [
        Timing::Once(at("2026-04-07T10:00:00Z")),
        cron("0 10 * * *", "UTC"),
    ] {
        let once = Schedule {
            recurring: false,
            ..schedule(timing, "2026-04-07T10:00:00Z")
        };
        let decide = |catch_up, now| {
            let once = Schedule {
                catch_up,
                ..once.clone()
            };
            once.decide(at(now), Standing::Ready)
        };
        let fire = Decision::Fire { next: None };
        let missed = Decision::Skip {
            reason: SkipReason::Missed,
            next: None,
        };
        assert_eq!(decide(CatchUp::Latest, "2026-04-07T10:00:00Z"), fire);
        assert_eq!(decide(CatchUp::Latest, "2026-04-09T10:00:00Z"), fire);
        assert_eq!(decide(CatchUp::Skip, "2026-04-07T10:01:00Z"), fire);
        assert_eq!(decide(CatchUp::Skip, "2026-04-09T10:00:00Z"), missed);
    }
}

fn part(least: u8, most: u8) -> impl Strategy<Value = String> {
    prop_oneof![
        (least..=most).prop_map(|n| n.to_string()),
        (least..=most, 0..=most, 1..=most).prop_map(move |(from, length, step)| {
            let to = from.saturating_add(length).min(most);
            format!("{from}-{to}/{step}")
        }),
        (1..=most).prop_map(|step| format!("*/{step}")),
    ]
}

fn field(least: u8, most: u8) -> impl Strategy<Value = String> {
    let list = proptest::collection::vec(part(least, most), 1..4);
    prop_oneof![Just("*".to_owned()), list.prop_map(|parts| parts.join(","))]
}

fn expression() -> impl Strategy<Value = String> {
    let date = prop_oneof![
        3 => Just("* * *".to_owned()),
        1 => (field(1, 31), field(1, 12), field(0, 7)).prop_map(|(d, m, w)| format!("{d} {m} {w}")),
    ];
    (field(0, 59), field(0, 23), date).prop_map(|(m, h, date)| format!("{m} {h} {date}"))
}

/// Instants near which the clocks of these zones change, and one near which none does.
fn place() -> impl Strategy<Value = (&'static str, DateTime<Utc>)> {
    let change = prop_oneof![
        Just(("UTC", "2026-06-15T00:00:00Z")),
        Just(("Europe/Berlin", "2026-03-29T01:00:00Z")),
        Just(("Europe/Berlin", "2026-10-25T01:00:00Z")),
        Just(("America/New_York", "2026-03-08T07:00:00Z")),
        Just(("America/New_York", "2026-11-01T06:00:00Z")),
        // Half an hour; and at midnight, where the repeated hour is the day before's.
        Just(("Australia/Lord_Howe", "2026-10-03T15:30:00Z")),
        Just(("Australia/Lord_Howe", "2026-04-04T15:00:00Z")),
        Just(("America/Santiago", "2026-04-05T03:00:00Z")),
        Just(("America/Santiago", "2026-09-06T04:00:00Z")),
    ];
    (change, -100_000_000_i64..20_000_000).prop_map(|((zone, change), milliseconds)| {
        (zone, at(change) + Duration::milliseconds(milliseconds))
    })
}

fn field_matches(field: &str, value: u32, most: u32) -> bool {
    field.split(',').any(|part| {
        let (range, step) = part.split_once('/').unwrap_or((part, "1"));
        let (from, to) = match range.split_once('-') {
            Some((from, to)) => (from.parse().unwrap(), to.parse().unwrap()),
            None if range == "*" => (u32::from(most == 31 || most == 12), most),
            None => (range.parse().unwrap(), range.parse().unwrap()),
        };
        (from..=to).contains(&value) && (value - from).is_multiple_of(step.parse().unwrap())
    })
}

fn clock_matches(expression: &str, local: NaiveDateTime) -> bool {
    use chrono::Datelike;
    let fields: Vec<&str> = expression.split(' ').collect();
    let weekday = local.weekday().num_days_from_sunday();
    field_matches(fields[0], local.minute(), 59)
        && field_matches(fields[1], local.hour(), 23)
        && field_matches(fields[2], local.day(), 31)
        && field_matches(fields[3], local.month(), 12)
        && (field_matches(fields[4], weekday, 7)
            || (weekday == 0 && field_matches(fields[4], 7, 7)))
}

/// Whether a minute of UTC is an occurrence, by the rule as it is stated and without any library for cron.
fn occurs(expression: &str, zone: Tz, minute: DateTime<Utc>) -> bool {
    let shows = |at: DateTime<Utc>| at.with_timezone(&zone).naive_local();
    let fields: Vec<&str> = expression.split(' ').collect();
    let here = shows(minute);
    if fields[0].contains('*') || fields[1].contains('*') {
        return clock_matches(expression, here);
    }
    let repeated = (1..=120).any(|back| shows(minute - Duration::minutes(back)) == here);
    let mut skipped = shows(minute - Duration::minutes(1)) + Duration::minutes(1);
    let mut in_gap = false;
    while skipped < here {
        in_gap |= clock_matches(expression, skipped);
        skipped += Duration::minutes(1);
    }
    in_gap || (clock_matches(expression, here) && !repeated)
}

/// Two days, minute by minute.
fn by_hand(expression: &str, zone: Tz, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
    let minute = now.with_second(0)?.with_nanosecond(0)?;
    (1..=2 * 24 * 60)
        .map(|minutes| minute + Duration::minutes(minutes))
        .find(|minute| occurs(expression, zone, *minute))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_next_occurrence_is_the_first_minute_that_matches(
        expression in expression(), (zone, now) in place(), ends_in in 1_i64..100_000,
    ) {
        let Ok(timing) = Timing::parse(&expression, Some(zone), true) else {
            // Only days that never come are refused.
            prop_assume!(false);
            return Ok(());
        };
        let next = timing.next_after(now);
        prop_assert!(next.is_none_or(|next| next > now));
        match by_hand(&expression, zone.parse().unwrap(), now) {
            Some(expected) => prop_assert_eq!(next, Some(expected), "{} {}", expression, zone),
            None => prop_assert!(next.is_none_or(|next| next > now + Duration::days(2) - Duration::minutes(1))),
        }
        let end = now + Duration::seconds(ends_in);
        for next in timing.upcoming(now, Some(end), 5) {
            prop_assert!(now < next && next < end);
            prop_assert!(occurs(&expression, zone.parse().unwrap(), next), "{} {} {}", expression, zone, next);
        }
    }

    /// However the process is interrupted: no occurrence starts two runs, each look starts at most one, with `latest`
    /// every outage that covered an occurrence ends with one run, and with `skip` only what is on time starts one.
    #[test]
    fn outages_neither_double_nor_lose_a_run(
        expression in expression(), (zone, start) in place(), catch_up in prop_oneof![Just(CatchUp::Latest), Just(CatchUp::Skip)],
        pauses in proptest::collection::vec(prop_oneof![3 => 1_i64..90_000, 1 => 1_i64..40_000_000], 1..40),
    ) {
        let Ok(timing) = Timing::parse(&expression, Some(zone), true) else {
            prop_assume!(false);
            return Ok(());
        };
        let end = start + Duration::days(2);
        let mut schedule = Schedule { due: timing.next_after(start), catch_up, end_date: Some(end), ..schedule(timing.clone(), "2026-01-01T00:00:00Z") };
        let (mut now, mut fired) = (start, Vec::new());
        for pause in pauses {
            let before = now;
            now += Duration::milliseconds(pause);
            let due = schedule.due;
            let covered = timing.next_after(before).is_some_and(|at| at <= now);
            let on_time = timing.next_after((now - GRACE - Duration::nanoseconds(1)).max(before)).is_some_and(|at| at <= now);
            let decision = schedule.decide(now, Standing::Ready);
            let next = match decision {
                Decision::Expire => {
                    prop_assert!(end <= now);
                    break;
                }
                Decision::Wait => {
                    prop_assert!(!covered);
                    continue;
                }
                Decision::Fire { next } => {
                    let wanted = if catch_up == CatchUp::Latest { covered } else { on_time };
                    prop_assert!(wanted);
                    fired.push(due);
                    next
                }
                Decision::Skip { reason, next } => {
                    prop_assert_eq!((reason, catch_up), (SkipReason::Missed, CatchUp::Skip));
                    prop_assert!(covered && !on_time);
                    next
                }
                Decision::Queue { .. } => return Err(TestCaseError::fail("nothing is under way")),
            };
            prop_assert!(next.is_none_or(|next| now < next && next < end));
            schedule.due = next;
        }
        prop_assert!(fired.is_sorted_by(|one, other| one < other), "{:?}", fired);
    }
}
