//! Medians, side by side.

use std::collections::BTreeMap;

/// What was measured of each system, over the rounds.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<String>,
    values: BTreeMap<(String, String), Vec<f64>>,
}

pub(crate) fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1) as f64;
    sorted
        .get((last * percent / 100.0).round() as usize)
        .copied()
        .unwrap_or(f64::NAN)
}

impl Report {
    pub(crate) fn add(&mut self, row: &str, system: &str, value: f64) {
        if !self.rows.iter().any(|known| known == row) {
            self.rows.push(row.to_owned());
        }
        self.values
            .entry((row.to_owned(), system.to_owned()))
            .or_default()
            .push(value);
    }

    fn median(&self, row: &str, system: &str) -> Option<f64> {
        self.values
            .get(&(row.to_owned(), system.to_owned()))
            .map(|values| percentile(values, 50.0))
    }

    /// Prints the table: polpo's figures as multiples of the reference's; `added` rows are less the direct ones first.
    pub(crate) fn print(&self, systems: &[&str]) {
        print!("{:<44}", "median over the rounds");
        for system in systems {
            print!("{system:>12}");
        }
        println!("{:>18}", "polpo/reference");
        for row in &self.rows {
            print!("{row:<44}");
            for system in systems {
                match self.median(row, system) {
                    Some(value) => print!("{value:>12.3}"),
                    None => print!("{:>12}", "-"),
                }
            }
            let ratio = match (
                self.median(row, "polpo"),
                self.median(row, "reference"),
                self.median(row, "direct"),
            ) {
                (Some(ours), Some(theirs), Some(direct)) if row.ends_with("ms") => {
                    format!("{:.2} (added)", (ours - direct) / (theirs - direct))
                }
                (Some(ours), Some(theirs), _) => format!("{:.2}", ours / theirs),
                _ => "-".to_owned(),
            };
            println!("{ratio:>18}");
        }
    }
}
