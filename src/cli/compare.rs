//! `qkv compare`: two runs of `qkv bench --json` beside each other.

use std::path::PathBuf;

use clap::Args;
use qkv::Result;
use serde_json::Value;

use super::bench::{Entry, Facts, Report};
use super::say;

#[derive(Args)]
pub struct Options {
    /// The run before
    #[arg(value_name = "A.json")]
    before: PathBuf,
    /// The run after
    #[arg(value_name = "B.json")]
    after: PathBuf,
}

/// Both runs' noise is what a ratio has to exceed; below this neither run's own noise is believed.
const LEAST_NOISE: f64 = 0.02;

/// What may be said of two figures.
#[derive(Debug, PartialEq)]
enum Change {
    Faster,
    Slower,
    Same,
    Noisy,
    /// An answer is wrong, so that its time is of nothing.
    Wrong,
    /// One time by the device's clock, one by the host's, which waits too.
    Clocks,
}

fn change(before: &Entry, after: &Entry, has_one_clock: bool) -> Change {
    if !before.is_right() || !after.is_right() {
        return Change::Wrong;
    }
    if !has_one_clock {
        return Change::Clocks;
    }
    if before.ms.is_noisy() || after.ms.is_noisy() {
        return Change::Noisy;
    }
    let ratio = after.ms.median / before.ms.median;
    let noise = (before.ms.noise() + after.ms.noise()).max(LEAST_NOISE);
    match ratio {
        ratio if ratio > 1.0 + noise => Change::Slower,
        ratio if ratio < 1.0 / (1.0 + noise) => Change::Faster,
        _ => Change::Same,
    }
}

pub fn run(options: &Options) -> Result<()> {
    let before = Report::load(&options.before)?;
    let after = Report::load(&options.after)?;
    if before.device != after.device {
        let [a, b] = [&before, &after].map(|run| &run.device);
        say(format_args!("not the same device:\n"))?;
        for (field, a, b) in differences(a, b) {
            say(format_args!("  {field}: {a} before, {b} after\n"))?;
        }
    }
    say(format_args!(
        "{:32}{:12}{:>12}{:>12}{:>8}\n",
        "B,H,Hk,Q,K,D", "route", "before, ms", "after, ms", "ratio"
    ))?;
    let mut counts = [0; 6];
    let (pairs, alone) = before.pairs(&after);
    for (a, b) in pairs {
        let has_one_clock = before.is_on_devices_clock(a) == after.is_on_devices_clock(b);
        let (ix, word) = match change(a, b, has_one_clock) {
            Change::Faster => (0, "faster"),
            Change::Slower => (1, "slower"),
            Change::Same => (2, ""),
            Change::Noisy => (3, "too noisy to tell"),
            Change::Wrong => (4, "an answer is WRONG"),
            Change::Clocks => (5, "not by the same clock"),
        };
        counts[ix] += 1;
        let (shape, route) = (a.shape.to_string(), &a.route);
        let (x, y) = (a.ms.median, b.ms.median);
        let other = match a.candidate.is_empty() || a.candidate == b.candidate {
            true => String::new(),
            false => format!("; {} before, {} after", a.candidate, b.candidate),
        };
        let said = format!("{word}{other}");
        let said = said.trim_start_matches("; ");
        let line = format!("{shape:32}{route:12}{x:12.4}{y:12.4}{:8.3}  {said}", y / x);
        say(format_args!("{}\n", line.trim_end()))?;
    }
    let [faster, slower, same, noisy, wrong, clocks] = counts;
    say(format_args!(
        "\n{faster} faster, {slower} slower, {same} the same within noise, {noisy} too noisy, {wrong} wrong, {clocks} by other clocks, \
         {alone} in one run only\n"
    ))
}

/// What differs of two devices: which fact, and what it was.
fn differences(before: &Facts, after: &Facts) -> Vec<(String, Value, Value)> {
    let [before, after] = [before, after].map(|facts| serde_json::json!(facts));
    let facts = before.as_object().into_iter().flatten();
    let changed = facts.filter(|(name, value)| after[name.as_str()] != **value);
    changed
        .map(|(name, value)| (name.clone(), value.clone(), after[name.as_str()].clone()))
        .collect()
}
