//! `qkv doctor`: every kernel of the device beside the oracle, as a table and as a report.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use qkv::doctor::{self, Check, Finding, Hard, Report, Subject};
use qkv::gpu::{DType, adapters};
use qkv::{Error, Result};

use super::attend::route_name;
use super::{devices, progress, say, write_whole};

#[derive(Args)]
pub struct Options {
    /// Also everything that was found, as JSON: for a bug report
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
}

/// Exit code 1 where a kernel is wrong, 2 where none is and not all were run.
pub fn run(options: &Options, device: Option<&str>) -> Result<ExitCode> {
    let started = Instant::now();
    let bar = progress(0, "{pos} checks, {msg}");
    let report = doctor::examine(device, &mut |check| {
        bar.inc(1);
        bar.set_message(variant(check));
    })?;
    bar.finish_and_clear();
    report.gpu.save_pipelines();
    if let Some(path) = &options.report {
        let text = format!("{:#}\n", json(&report, device)?);
        write_whole(path, |part| {
            std::fs::write(part, text).map_err(|e| Error::file(path, e))
        })?;
    }

    let chosen = adapters(device)?;
    let chosen = chosen.iter().find(|adapter| adapter.chosen.is_some());
    if let Some(adapter) = chosen {
        say(format_args!("{}\n", devices::text(adapter)))?;
    }
    say(format_args!("\n{}", table(&report.checks)))?;
    let wrong: Vec<&Check> = report
        .checks
        .iter()
        .filter(|c| c.outcome.is_err())
        .collect();
    for check in &wrong {
        if let Err(said) = &check.outcome {
            let name = check.subject.problem();
            say(format_args!("\n{}, {name}: {said}\n", variant(check)))?;
        }
    }
    let all = report.checks.len();
    let seconds = started.elapsed().as_secs_f64();
    say(format_args!(
        "\n{} of {all} checks are right ({seconds:.1} s)\n",
        all - wrong.len()
    ))?;
    for (power, finding) in powers(&report) {
        if let Finding::Wrong(said) = finding {
            say(format_args!(
                "{power}: not used on this device from now on: {said}\n"
            ))?;
        }
    }
    for line in doctor::avoided(&report.claimed) {
        say(format_args!("avoided: {line}\n"))?;
    }
    match (wrong.is_empty(), report.ended) {
        (false, Some(error)) => say(format_args!("not all checks were made: {error}\n"))?,
        (false, None) => {}
        (true, Some(error)) => return Err(error),
        (true, None) => return Ok(ExitCode::SUCCESS),
    }
    Ok(ExitCode::FAILURE)
}

fn powers(report: &Report) -> [(&'static str, &Finding); 4] {
    let verdict = &report.verdict;
    [
        ("subgroups", &verdict.subgroups),
        ("f16", &verdict.f16),
        ("products in f16", &verdict.f16_math),
        ("cooperative matrices", &verdict.matrices),
    ]
}

/// What ran: route or product, storage, and whether subgroup operations were kept from it.
fn variant(check: &Check) -> String {
    let [own, cached] = check.storage.map(DType::name);
    let storage = match own == cached {
        true => own.to_string(),
        false => format!("{own}, k and v {cached}"),
    };
    let (asked, in_f16) = match check.subject {
        Subject::Attention {
            route, f16_math, ..
        } => (route_name(route), f16_math),
        Subject::Product => ("matmul", false),
    };
    let kernels = match check.kernels.first() {
        None | Some(&"scores" | &"block_map") => asked,
        Some(name) => name,
    };
    let math = if in_f16 { " multiplied in it" } else { "" };
    let without = match check.subgroups {
        true => "",
        false => " without subgroups",
    };
    format!("{kernels} {storage}{math}{without}")
}

/// A line a variant, a column a problem: green where it is right, with its worst error over what is allowed.
fn table(checks: &[Check]) -> String {
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let paint = |code: u8, text: String| match colours {
        true => format!("\x1b[{code}m{text}\x1b[0m"),
        false => text,
    };
    let mut text = format!("{:44}", "worst error, 1 is allowed");
    let problems: Vec<&str> = Hard::ALL
        .map(Hard::name)
        .into_iter()
        .chain(["product"])
        .collect();
    for problem in &problems {
        text += &format!("{problem:>9}");
    }
    text.push('\n');
    // The kernel that a problem is planned on may differ, so lines are by what was asked for.
    let key = |check: &Check| {
        let asked = match check.subject {
            Subject::Attention {
                route, f16_math, ..
            } => Some((route, f16_math)),
            Subject::Product => None,
        };
        (check.storage, asked, check.subgroups, check.matrices)
    };
    let mut done = Vec::new();
    for first in checks {
        if done.contains(&key(first)) {
            continue;
        }
        done.push(key(first));
        text += &format!("{:44}", variant(first));
        for problem in &problems {
            let of =
                |check: &&Check| key(check) == key(first) && check.subject.problem() == *problem;
            text += &match checks.iter().find(of).map(|check| &check.outcome) {
                None => format!("{:>9}", "-"),
                Some(Ok(worst)) => paint(32, format!("{worst:9.3}")),
                Some(Err(_)) => paint(31, format!("{:>9}", "WRONG")),
            };
        }
        text.push('\n');
    }
    text
}

fn json(report: &Report, device: Option<&str>) -> Result<serde_json::Value> {
    let chosen = adapters(device)?;
    let chosen = chosen.iter().find(|adapter| adapter.chosen.is_some());
    let finding = |finding: &Finding| match finding {
        Finding::Unknown => "unknown".to_string(),
        Finding::Right => "right".to_string(),
        Finding::Wrong(said) => format!("wrong: {said}"),
    };
    let checks = report.checks.iter().map(|check| {
        let (worst, wrong) = match &check.outcome {
            Ok(worst) => (Some(worst), None),
            Err(said) => (None, Some(said)),
        };
        let (route, f16_math) = match check.subject {
            Subject::Attention {
                route, f16_math, ..
            } => (Some(route_name(route)), f16_math),
            Subject::Product => (None, false),
        };
        serde_json::json!({
            "problem": check.subject.problem(),
            "route": route,
            "f16_math": f16_math,
            "kernels": check.kernels,
            "storage": check.storage[0].name(),
            "kv_storage": check.storage[1].name(),
            "subgroups": check.subgroups,
            "matrices": check.matrices,
            "worst_error": worst,
            "wrong": wrong,
            "ms": check.time.as_secs_f64() * 1e3,
        })
    });
    let checks: Vec<serde_json::Value> = checks.collect();
    let [subgroups, f16, f16_math, matrices] = powers(report).map(|(_, found)| finding(found));
    Ok(serde_json::json!({
        "qkv": env!("CARGO_PKG_VERSION"),
        "device": chosen.map(devices::json),
        "verdict": {
            "subgroups": subgroups,
            "f16": f16,
            "f16_math": f16_math,
            "matrices": matrices,
        },
        "avoided": doctor::avoided(&report.claimed),
        "checks": checks,
        "ended": report.ended.as_ref().map(Error::to_string),
    }))
}
