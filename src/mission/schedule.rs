//! When a mission runs (contract 2.12): expressions, their occurrences, and what is done when one is due.
//!
//! **Clocks that change.** An expression with a `*` in its minute or hour is a rhythm: it matches whenever the clock of its
//! zone shows a matching minute, so it leaves out an hour that is skipped and runs in both halves of an hour that is
//! repeated, and `*/15 * * * *` is every 15 minutes of real time. Without one it names times of day: a time that is
//! skipped is run once, at the first instant after the gap (with all others of that gap), and a time that comes twice is
//! run the first time only.

use chrono::{DateTime, Duration, NaiveDateTime, TimeZone, Timelike, Utc};
use chrono_tz::Tz;
use croner::parser::{CronParser, Seconds, Year};
use serde::{Deserialize, Serialize};

/// Later than this an occurrence was missed, and `catchUp` says what becomes of it.
const GRACE: Duration = Duration::seconds(60);

/// The rarest day that exists, a 29 February on a given weekday, comes again within 40 years.
const HORIZON: Duration = Duration::days(50 * 366);

/// The longest gap of a clock: a day, when a country changed sides of the date line.
const LONGEST_GAP_MINUTES: i64 = 1500;

/// The longest expression, in bytes.
const LONGEST: usize = 256;

/// When a mission runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Timing {
    /// Whenever the clock matches.
    Cron(Cron),
    /// At one instant.
    Once(DateTime<Utc>),
}

/// A cron expression of five fields and the zone whose clock it reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cron {
    expression: String,
    zone: Tz,
    pattern: Box<croner::Cron>,
    /// Whether it names times of day rather than a rhythm.
    fixed: bool,
}

/// Why a timing cannot be used: the parameter at fault and a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TimingError {
    /// `expression` or `timezone`.
    pub parameter: &'static str,
    /// What to change.
    pub message: String,
}

impl Timing {
    /// Reads a cron expression of five fields, or an ISO 8601 timestamp for a single run. The zone is an IANA name, UTC
    /// when absent; of a timestamp it says what is meant without an offset. A cron expression that is not `recurring` is
    /// run once, at its next match.
    ///
    /// # Errors
    /// Which parameter cannot be used, and why. A timestamp that has passed is none: it has no [`Timing::next_after`].
    pub fn parse(
        expression: &str,
        timezone: Option<&str>,
        recurring: bool,
    ) -> Result<Self, TimingError> {
        let zone = timezone.map_or(Ok(Tz::UTC), |name| {
            name.parse().map_err(|_| TimingError {
                parameter: "timezone",
                message: "`timezone` must be an IANA name like `Europe/Berlin`, or absent for UTC."
                    .to_owned(),
            })
        })?;
        let expression = expression.trim();
        if expression.len() > LONGEST {
            Err(fault(format!(
                "`expression` may be at most {LONGEST} bytes."
            )))
        } else if !looks_like_a_date(expression) {
            Cron::parse(expression, zone).map(Self::Cron).map_err(fault)
        } else if recurring {
            Err(fault(
                "`expression` must be cron when `recurring` is true: a timestamp comes only once."
                    .to_owned(),
            ))
        } else {
            instant(expression, zone).map(Self::Once).ok_or_else(|| {
                fault(
                    "`expression` must be five fields of cron like `30 6 * * 1-5`, or a timestamp like `2026-04-08T06:30:00Z`."
                        .to_owned(),
                )
            })
        }
    }

    /// The first occurrence after an instant; `None` when there is none, or none within 50 years.
    pub fn next_after(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Self::Once(at) => Some(*at).filter(|at| *at > now),
            Self::Cron(cron) => cron.next_after(now),
        }
    }

    /// The next occurrences, at most `count`, all before `end`.
    pub fn upcoming(
        &self,
        now: DateTime<Utc>,
        end: Option<DateTime<Utc>>,
        count: usize,
    ) -> Vec<DateTime<Utc>> {
        std::iter::successors(self.next_after(now), |at| self.next_after(*at))
            .take_while(|at| end.is_none_or(|end| *at < end))
            .take(count)
            .collect()
    }
}

fn fault(message: String) -> TimingError {
    TimingError {
        parameter: "expression",
        message,
    }
}

/// No field of cron has four digits.
fn looks_like_a_date(expression: &str) -> bool {
    let mut start = expression.bytes();
    start.by_ref().take(4).all(|byte| byte.is_ascii_digit()) && start.next() == Some(b'-')
}

fn instant(expression: &str, zone: Tz) -> Option<DateTime<Utc>> {
    let formats = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M"];
    let with_offset = formats
        .iter()
        .find_map(|format| DateTime::parse_from_str(expression, &format!("{format}%#z")).ok());
    match with_offset {
        Some(at) => Some(at.to_utc()),
        None => formats
            .iter()
            .find_map(|format| NaiveDateTime::parse_from_str(expression, format).ok())
            .and_then(|local| first_instant(zone, local)),
    }
}

/// When a zone's clock first shows a time; the end of the gap when it never does.
fn first_instant(zone: Tz, local: NaiveDateTime) -> Option<DateTime<Utc>> {
    let found = zone.from_local_datetime(&local).earliest().or_else(|| {
        let minute = local.with_second(0)?.with_nanosecond(0)?;
        (1..=LONGEST_GAP_MINUTES).find_map(|minutes| {
            let later = minute.checked_add_signed(Duration::minutes(minutes))?;
            zone.from_local_datetime(&later).earliest()
        })
    });
    found.map(|at| at.to_utc())
}

impl Cron {
    /// Its five fields, a blank between each.
    pub fn expression(&self) -> &str {
        &self.expression
    }

    /// The IANA name of the zone whose clock it reads.
    pub fn zone(&self) -> &'static str {
        self.zone.name()
    }

    /// The library reads more than the contract has (names, seconds, `L`), so the grammar is checked here.
    fn parse(expression: &str, zone: Tz) -> Result<Self, String> {
        let fields: Vec<&str> = expression.split_ascii_whitespace().collect();
        if fields.len() != FIELDS.len() {
            return Err(format!(
                "`expression` has {} fields; it must have five: minute, hour, day, month and weekday.",
                fields.len()
            ));
        }
        for (text, (field, least, most)) in fields.iter().zip(FIELDS) {
            if !text.split(',').all(|part| is_part(part, least, most))
                || (text.contains(',') && text.split(',').any(|part| part == "*"))
            {
                return Err(format!(
                    "`expression` has \"{text}\" as its {field}; it must be `*`, numbers from {least} to {most}, ranges (`1-5`), steps (`*/2`, `1-5/2`), or a list of these."
                ));
            }
        }
        let expression = fields.join(" ");
        let pattern = CronParser::builder()
            .seconds(Seconds::Disallowed)
            .year(Year::Disallowed)
            .dom_and_dow(true)
            .build()
            .parse(&expression)
            .map_err(|error| format!("`expression` cannot be used: {error}."))?;
        let fixed = !fields[0].contains('*') && !fields[1].contains('*');
        let cron = Self {
            expression,
            zone,
            pattern: Box::new(pattern),
            fixed,
        };
        if cron.has_a_day() {
            Ok(cron)
        } else {
            Err("`expression` never matches: none of its months has one of its days.".to_owned())
        }
    }

    /// Every day that exists at all falls on every weekday some year.
    fn has_a_day(&self) -> bool {
        let first = self.pattern.pattern.days.values().into_iter().min();
        self.pattern.pattern.months.values().iter().any(|month| {
            let longest = match month {
                2 => 29,
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            first.is_some_and(|day| day <= longest)
        })
    }

    fn next_after(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let here = now.with_timezone(&self.zone);
        let next = if self.fixed {
            // Read off a clock that never changes; what it shows is then looked up in the zone. Times that were
            // moved to the end of a gap, or that came before in a repeated hour, may lie behind.
            let mut local = here.naive_local();
            loop {
                local = self.pattern.find_next_occurrence(&local, false).ok()?;
                match first_instant(self.zone, local) {
                    Some(at) if at > now => break at,
                    _ => {}
                }
            }
        } else {
            self.pattern
                .find_next_occurrence(&here, false)
                .ok()?
                .to_utc()
        };
        Some(next).filter(|at| *at - now < HORIZON)
    }
}

/// The fields of an expression and their bounds.
const FIELDS: [(&str, u8, u8); 5] = [
    ("minute", 0, 59),
    ("hour", 0, 23),
    ("day of the month", 1, 31),
    ("month", 1, 12),
    ("weekday", 0, 7),
];

fn is_part(part: &str, least: u8, most: u8) -> bool {
    let (range, step) = match part.split_once('/') {
        Some((range, step)) => (range, Some(step)),
        None => (part, None),
    };
    let step_fits = step.is_none_or(|step| number(step).is_some_and(|n| (1..=most).contains(&n)));
    let range_fits = if range == "*" {
        true
    } else if let Some((from, to)) = range.split_once('-') {
        matches!((number(from), number(to)), (Some(from), Some(to)) if least <= from && from <= to && to <= most)
    } else {
        // A step needs something to step through.
        step.is_none() && number(range).is_some_and(|n| (least..=most).contains(&n))
    };
    step_fits && range_fits
}

fn number(text: &str) -> Option<u8> {
    let plain = (1..=2).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

/// What becomes of occurrences that were missed, because no process ran.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ScheduleCatchUp)]
pub enum CatchUp {
    /// However many were missed, one run makes up for them.
    #[default]
    Latest,
    /// They are left out.
    Skip,
}

/// What becomes of an occurrence while the run before it is still under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ScheduleOverlap)]
pub enum Overlap {
    /// It is left out.
    #[default]
    Skip,
    /// One run follows as soon as the one under way has ended, however many were due.
    Queue,
}

/// Where the mission of a schedule stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It waits for its schedule: `scheduled` or `recurring`.
    Ready,
    /// A run of it is under way: `active` or `paused`.
    Busy,
    /// Anything else: its schedule does not start it (contract 2.12).
    Elsewhere,
}

/// What is done about a schedule. `next` is when it is due again; a recurring schedule without one has come to its end,
/// and nothing but its `endDate` is left to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It is disabled or not due yet.
    Wait,
    /// The mission starts now.
    Fire {
        /// When it is due again.
        next: Option<DateTime<Utc>>,
    },
    /// This occurrence is left out.
    Skip {
        /// Why.
        reason: SkipReason,
        /// When it is due again.
        next: Option<DateTime<Utc>>,
    },
    /// The mission starts once when the run under way has ended.
    Queue {
        /// When it is due again.
        next: Option<DateTime<Utc>>,
    },
    /// Its `endDate` is here: it is disabled and its mission completed.
    Expire,
}

/// Why an occurrence was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipReason {
    /// Its time was more than a minute ago, and `catchUp` is `skip`.
    Missed,
    /// The run before it is still under way, and `overlap` is `skip`.
    Overlap,
    /// The mission does not wait for its schedule.
    NotScheduled,
    /// An earlier occurrence waits for a person's yes.
    AwaitingApproval,
    /// Nobody said yes to it in time.
    NotApproved,
}

/// A schedule as far as it decides when its mission runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// When it is due.
    pub timing: Timing,
    /// Whether it is due again after it was.
    pub recurring: bool,
    /// Whether it is due at all.
    pub enabled: bool,
    /// From this instant on it is not due any more.
    pub end_date: Option<DateTime<Utc>>,
    /// The earliest occurrence that nothing was decided about; `None` when there is no other.
    pub due: Option<DateTime<Utc>>,
    /// What becomes of missed occurrences.
    pub catch_up: CatchUp,
    /// What becomes of occurrences while a run is under way.
    pub overlap: Overlap,
}

impl Schedule {
    /// Decides about everything that is due by now, as one. Whoever acts on it stores `next` as the new `due` in the same
    /// commit. An occurrence more than 60 s ago was missed. A single run that is left out does not come again.
    pub fn decide(&self, now: DateTime<Utc>, mission: Standing) -> Decision {
        if !self.enabled {
            return Decision::Wait;
        }
        if self.is_over(now) {
            return Decision::Expire;
        }
        let Some(due) = self.due.filter(|due| *due <= now) else {
            return Decision::Wait;
        };
        let next = self.next_after(now).filter(|_| self.recurring);
        let skip = |reason| Decision::Skip { reason, next };
        match mission {
            Standing::Elsewhere => skip(SkipReason::NotScheduled),
            _ if self.catch_up == CatchUp::Skip && self.was_missed(due, now) => {
                skip(SkipReason::Missed)
            }
            Standing::Ready => Decision::Fire { next },
            Standing::Busy if self.overlap == Overlap::Queue => Decision::Queue { next },
            Standing::Busy => skip(SkipReason::Overlap),
        }
    }

    /// Whether its `endDate` is here.
    pub fn is_over(&self, now: DateTime<Utc>) -> bool {
        self.end_date.is_some_and(|end| end <= now)
    }

    /// When it is due after an instant, its `endDate` considered. It is always after that instant, so a schedule never
    /// fires in a burst.
    pub fn next_after(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let next = self.timing.next_after(now)?;
        Some(next).filter(|next| self.end_date.is_none_or(|end| *next < end))
    }

    /// Whether all that was due since `due` was missed. After an outage the latest occurrence may be on time though the
    /// earlier ones were not.
    fn was_missed(&self, due: DateTime<Utc>, now: DateTime<Utc>) -> bool {
        let missed_before = now - GRACE;
        let on_time = || {
            let latest = self
                .timing
                .next_after(missed_before - Duration::nanoseconds(1));
            self.recurring && latest.is_some_and(|at| at <= now)
        };
        due < missed_before && !on_time()
    }
}

#[cfg(test)]
mod tests;
