//! Durations as delays write them (contract 2.8.6).

use std::time::Duration;

/// Ten years: whoever waits longer has made a mistake.
const LONGEST: Duration = Duration::from_secs(315_576_000);

/// What a duration is made of, in its order: the letter, whether it stands after the `T`, and its seconds. A year
/// counts 365.25 days and a month 30.44 (contract 2.8.6).
const UNITS: [(char, bool, u64); 7] = [
    ('Y', false, 31_557_600),
    ('M', false, 2_630_016),
    ('W', false, 604_800),
    ('D', false, 86_400),
    ('H', true, 3_600),
    ('M', true, 60),
    ('S', true, 1),
];

/// More digits than these say nothing that fits into ten years, or below a nanosecond.
const MOST_DIGITS: usize = 9;

/// Reads an ISO 8601 duration, `P[nY][nM][nW][nD][T[nH][nM][nS]]`, whose seconds may have a fraction.
///
/// # Errors
/// A sentence, without the parameter's name: it is no such duration, is zero, or is longer than ten years.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let parsed = read(text).ok_or_else(|| {
        "must be an ISO 8601 duration like `PT30M`, `P1DT12H` or `PT1.5S`.".to_owned()
    })?;
    if parsed.is_zero() {
        Err("must be longer than zero.".to_owned())
    } else if parsed > LONGEST {
        Err("must be at most ten years.".to_owned())
    } else {
        Ok(parsed)
    }
}

fn read(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('P')?;
    let mut units = UNITS.iter();
    let mut in_time = false;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        if let (false, Some(time)) = (in_time, rest.strip_prefix('T')) {
            in_time = true;
            rest = time;
        }
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, unit) = rest.split_at(end);
        let letter = unit.chars().next()?;
        // The units that are left are those after the last one: so none comes twice or out of its order.
        let (_, _, seconds) =
            units.find(|(name, after_t, _)| (*name, *after_t) == (letter, in_time))?;
        total = total.checked_add(amount(number, *seconds)?)?;
        rest = &unit[letter.len_utf8()..];
    }
    // A `T` must be followed by something, and so must the `P`.
    text.ends_with(|c: char| c != 'T' && c != 'P')
        .then_some(total)
}

/// So many units of so many seconds. Only seconds have fractions.
fn amount(number: &str, seconds: u64) -> Option<Duration> {
    let (whole, fraction) = match number.split_once('.') {
        None => (number, "0"),
        Some((whole, fraction)) if seconds == 1 => (whole, fraction),
        Some(_) => return None,
    };
    if whole.len() > MOST_DIGITS || !(1..=MOST_DIGITS).contains(&fraction.len()) {
        return None;
    }
    let whole = Duration::from_secs(whole.parse::<u64>().ok()?.checked_mul(seconds)?);
    let nanoseconds = format!("{fraction:0<MOST_DIGITS$}").parse().ok()?;
    whole.checked_add(Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_the_contract_writes_them() {
        for (text, milliseconds) in [
            ("PT1S", 1_000),
            ("PT0.5S", 500),
            ("PT1.25S", 1_250),
            ("PT0.001S", 1),
            ("PT30M", 1_800_000),
            ("PT1H30M5S", 5_405_000),
            ("P1D", 86_400_000),
            ("P1W", 604_800_000),
            ("P2WT1M", 1_209_660_000),
            ("P1M", 2_630_016_000),
            ("P1Y", 31_557_600_000),
            ("P1Y1M1W1DT1H1M1S", 34_882_477_000_u64),
            ("P0DT1S", 1_000),
            ("P10Y", 315_576_000_000),
            ("PT000000001S", 1_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
        assert_eq!(
            parse_duration("PT0.000000001S"),
            Ok(Duration::from_nanos(1))
        );
    }

    #[test]
    fn what_is_no_duration_is_refused_with_a_sentence() {
        for (text, part) in [
            ("", "ISO 8601"),
            ("P", "ISO 8601"),
            ("PT", "ISO 8601"),
            ("P1DT", "ISO 8601"),
            ("1D", "ISO 8601"),
            ("p1d", "ISO 8601"),
            (" P1D", "ISO 8601"),
            ("P1D ", "ISO 8601"),
            ("P-1D", "ISO 8601"),
            ("P+1D", "ISO 8601"),
            ("-P1D", "ISO 8601"),
            ("P1H", "ISO 8601"),
            ("PT1D", "ISO 8601"),
            ("P1D1D", "ISO 8601"),
            ("P1D1W", "ISO 8601"),
            ("PT1S1M", "ISO 8601"),
            ("PT1HT1M", "ISO 8601"),
            ("P1.5D", "ISO 8601"),
            ("PT1.5M", "ISO 8601"),
            ("PT1.S", "ISO 8601"),
            ("PT.5S", "ISO 8601"),
            ("PT1.2.3S", "ISO 8601"),
            ("PT1,5S", "ISO 8601"),
            ("PT0.0000000001S", "ISO 8601"),
            ("PT", "ISO 8601"),
            ("PT5", "ISO 8601"),
            ("P1Dé", "ISO 8601"),
            ("P1é", "ISO 8601"),
            ("P٣D", "ISO 8601"),
            ("PT9999999999S", "ISO 8601"),
            ("thirty minutes", "ISO 8601"),
            ("PT0S", "longer than zero"),
            ("P0Y0M0W0DT0H0M0.0S", "longer than zero"),
            ("P11Y", "ten years"),
            ("P10YT0.000000001S", "ten years"),
            ("P999999999Y", "ten years"),
        ] {
            let message = parse_duration(text).unwrap_err();
            assert!(message.contains(part), "{text:?}: {message}");
        }
    }
}
