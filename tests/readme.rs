//! The README's table of attention is what the reports in benches/record say.
//!
//! ```text
//! WRITE=1 cargo test --release --test readme      writes it anew
//! ```
#![cfg(feature = "cli")]

use std::path::{Path, PathBuf};

#[path = "../src/cli/bench/report.rs"]
#[allow(dead_code)]
mod report;
#[path = "../src/cli/bench/shape.rs"]
#[allow(dead_code)]
mod shape;

use report::{Entry, NOISY, Rates, Refused, Report};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// What the README has before and after the table.
const BEGIN: &str = "<!-- from benches/record/attention-*.json by tests/readme.rs -->\n";
const END: &str = "<!-- to here -->\n";

/// As the program names them.
const PEERS: [&str; 4] = ["ort", "burn", "ggml", "torch"];

/// Three digits.
fn short(x: f64) -> String {
    let digits = (2 - x.log10().floor() as i32).clamp(0, 3) as usize;
    format!("{x:.digits$}")
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Milliseconds, and how noisy they are where that is too much for them to mean anything.
fn ms(entry: &Entry) -> String {
    let ms = short(entry.ms.median);
    match entry.ms.is_noisy() {
        true => format!("{ms} (± {})", percent(entry.ms.noise())),
        false => ms,
    }
}

fn rate(entry: &Entry) -> String {
    match entry.shape.is_decode() {
        true => format!("{} GB/s", short(entry.gb_s)),
        false => format!("{} GFLOP/s", short(entry.gflops)),
    }
}

fn share(entry: &Entry) -> String {
    match (entry.limit_noisy, entry.share) {
        (true, _) => "limit too noisy".into(),
        (false, share) => share.map_or(String::new(), percent),
    }
}

/// A peer's time, and how many times ours that is or how wrong.
fn beside(entry: &Entry) -> String {
    let peer = entry.peer.as_ref().expect("a peer's entry");
    let ms = ms(entry);
    match (peer.right, entry.ratio) {
        (false, _) => format!("{ms}, wrong by {:.1} %", peer.rms_error * 100.0),
        (true, Some(ratio)) => format!("{ms}, {} ×", short(ratio)),
        (true, None) => ms,
    }
}

fn limits(name: &str, rates: &Rates) -> String {
    let [flops, read] = [rates.gflops, rates.read_gb_s].map(short);
    format!("in {name} {flops} GFLOP/s of multiply-adds and {read} GB/s of reads")
}

/// A line for each shape, ours as planned and the peers; then what gave no figure.
fn section(report: &Report, record: &str) -> String {
    let device = &report.device;
    let f16 = report.limits.f16.map(|rates| limits("f16", &rates));
    let most = [Some(limits("f32", &report.limits.f32)), f16]
        .into_iter()
        .flatten();
    let mut text = format!(
        "{}, {} ([record](benches/record/{record})): {}.\n\n",
        device.driver,
        device.backend,
        most.collect::<Vec<_>>().join("; ")
    );
    let mut peers: Vec<(&str, String)> = Vec::new();
    for entry in &report.entries {
        let about = entry.peer.as_ref().map(|peer| &peer.about);
        if let Some(about) = about
            && peers.iter().all(|(name, _)| *name != entry.route)
        {
            let version = about.get("version").map_or("", String::as_str);
            peers.push((&entry.route, format!("{} {version}", entry.route)));
        }
    }
    // What gave no figure is numbered, and explained below.
    let mut reasons: Vec<(&str, &str)> = Vec::new();
    for one in &report.refused {
        let reason = (one.route.as_str(), one.why.as_str());
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
        if peers.iter().all(|(name, _)| *name != one.route) && PEERS.contains(&one.route.as_str()) {
            peers.push((&one.route, one.route.clone()));
        }
    }
    text += "| B,H,Hk,Q,K,D | ms | rate | of the limit |";
    text += &peers
        .iter()
        .map(|(_, title)| format!(" {title} |"))
        .collect::<String>();
    text += &format!("\n|{}\n", " --- |".repeat(4 + peers.len()));
    for ours in report.entries.iter().filter(|entry| entry.chosen) {
        let figures = match ours.ms.is_noisy() {
            true => [String::new(), String::new()],
            false => [rate(ours), share(ours)],
        };
        text += &format!(
            "| {} | {} | {} |",
            ours.shape,
            ms(ours),
            figures.join(" | ")
        );
        for (name, _) in &peers {
            let its = |entry: &&Entry| entry.shape == ours.shape && entry.route == *name;
            let its = match report.entries.iter().find(its) {
                Some(its) => beside(its),
                None => {
                    let failed = |one: &&Refused| one.shape == ours.shape && one.route == *name;
                    let one = report.refused.iter().find(failed);
                    let reason = one.map(|one| (one.route.as_str(), one.why.as_str()));
                    let of = reasons.iter().position(|known| Some(*known) == reason);
                    of.map_or(String::new(), |ix| format!("none ({})", ix + 1))
                }
            };
            text += &format!(" {its} |");
        }
        text += "\n";
    }
    for (ix, (route, why)) in reasons.iter().enumerate() {
        let before = if ix == 0 { "\n" } else { "" };
        let why: String = why.chars().take(400).collect();
        text += &format!("{before}{}. {route}: {why}\n", ix + 1);
    }
    text
}

/// The device's sections, the newest driver first, and how to read them.
fn table() -> String {
    let folder = Path::new(ROOT).join("benches/record");
    let names = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| name.starts_with("attention-") && name.ends_with(".json"));
    names.sort();
    assert!(!names.is_empty(), "no record in {}", folder.display());
    let sections = names.iter().rev().map(|name| {
        let report = Report::load(&folder.join(name)).unwrap();
        section(&report, name)
    });
    let noisy = percent(NOISY);
    format!(
        "{}\nTimes are medians; with ± where more than {noisy} of one lie between the quartiles, and it means little. A peer's \
         is in\nms too, then how many times ours, by runs that followed each other and by one clock: ours by the host's too, for \
         what goes by that.\n",
        sections.collect::<Vec<_>>().join("\n")
    )
}

#[test]
fn the_readme_has_the_figures_of_the_records() {
    let path = PathBuf::from(ROOT).join("README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = readme.split_once(BEGIN).expect("where the table begins");
    let (has, after) = rest.split_once(END).expect("where the table ends");
    let wanted = table();
    if std::env::var_os("WRITE").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{wanted}{END}{after}")).unwrap();
        return;
    }
    let same = has == wanted;
    assert!(
        same,
        "README.md is not up to date: WRITE=1 cargo test --release --test readme\n{wanted}"
    );
}

#[test]
fn what_is_noisy_wrong_or_failed_is_said() {
    let shape = |f16: bool| {
        serde_json::json!({ "batch": 1, "heads": 8, "kv_heads": 8, "q_len": 512, "k_len": 512, "dim": 64,
            "causal": true, "f16": f16 })
    };
    let entry = |f16: bool, route: &str, wide: f64, peer: Option<bool>| {
        let mut entry = serde_json::json!({
            "shape": shape(f16), "route": route, "plan": "", "chosen": peer.is_none(), "ratio": null,
            "first_ms": 1.0, "host_ms": null, "gflops": 12.345, "gb_s": 1.0, "share": 0.5, "error": 0.1,
            "rows": 1, "times_ms": [],
            "ms": { "median": 2.0, "low": 2.0, "high": 2.0 + wide },
        });
        if let Some(right) = peer {
            entry["peer"] = serde_json::json!({ "about": { "version": "1.0", "device": "x" },
                "timestamps": true, "max_error": 1.0, "rms_error": 0.0334, "right": right });
            entry["ratio"] = serde_json::json!(right.then_some(1.5));
        }
        entry
    };
    let report = serde_json::json!({
        "qkv": "0.1.0",
        "device": { "name": "none", "kind": "software", "backend": "vulkan", "driver": "a driver",
            "subgroups": null, "f16": false, "workgroup_memory": 16384, "max_binding": 1,
            "timestamps": true },
        "limits": { "f32": { "gflops": 96.26, "read_gb_s": 6.309, "copy_gb_s": 1.0 }, "f16": null },
        "entries": [
            entry(false, "prefill", 0.1, None),
            entry(false, "ort", 0.1, Some(false)),
            entry(false, "torch", 0.0, Some(true)),
            entry(true, "prefill", 0.5, None),
            entry(true, "ort", 0.6, Some(true)),
        ],
        "refused": [
            { "shape": shape(false), "route": "burn", "why": "no answer in 1 s" },
            { "shape": shape(true), "route": "burn", "why": "no answer in 1 s" },
            { "shape": shape(true), "route": "torch", "why": "no answer in 1 s" },
        ],
    });
    let mut report: Report = serde_json::from_value(report).unwrap();
    let wanted = "\
a driver, vulkan ([record](benches/record/a.json)): in f32 96.3 GFLOP/s of multiply-adds and 6.31 GB/s of reads.

| B,H,Hk,Q,K,D | ms | rate | of the limit | ort 1.0 | torch 1.0 | burn |
| --- | --- | --- | --- | --- | --- | --- |
| 1,8,8,512,512,64,causal | 2.00 | 12.3 GFLOP/s | 50 % | 2.00, wrong by 3.3 % | 2.00, 1.50 × | none (1) |
| 1,8,8,512,512,64,causal,f16 | 2.00 (± 25 %) |  |  | 2.00 (± 30 %), 1.50 × | none (2) | none (1) |

1. burn: no answer in 1 s
2. torch: no answer in 1 s
";
    assert_eq!(section(&report, "a.json"), wanted);
    // 12.345 GFLOP/s are 13 % of 96.26, unless those are noise or too few.
    let rates = report.limits.f32;
    for (gflops, noise, share) in [
        (96.26, 0.0, " 13 % "),
        (96.26, 0.11, " limit too noisy "),
        (12.0, 0.0, " 103 % "),
        (11.5, 0.0, " limit too noisy "),
    ] {
        report.limits.f32 = Rates {
            gflops,
            noise: [noise, 0.0, 0.0],
            ..rates
        };
        report.judge();
        let text = section(&report, "a.json");
        let line = format!("| 2.00 | 12.3 GFLOP/s |{share}|");
        assert!(text.contains(&line), "{line}: {text}");
    }
}
