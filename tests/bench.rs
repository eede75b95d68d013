//! `qkv bench`, `qkv compare` and `qkv doctor` from outside.
#![cfg(feature = "cli")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn qkv(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
    command.args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn refuses(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_bench_verifies_times_and_writes_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let [report, table, page] = ["a.json", "a.csv", "a.html"].map(path);
    let said = stdout(&qkv(&[
        "bench",
        "1,4,2,1,300,16",
        "1,4,2,1,600,16",
        "1,2,2,40,40,16,causal",
        "--routes",
        "planned,all",
        "--seconds",
        "0",
        "--json",
        &report,
        "--csv",
        &table,
        "--html",
        &page,
    ]));
    assert!(said.contains("limits in f32: "), "{said}");

    let found = json(Path::new(&report));
    let entries = found["entries"].as_array().unwrap();
    // What is planned is one of the three routes, and measured once.
    assert_eq!(entries.len(), 9, "{found:#}");
    for shape in entries.chunks(3) {
        let chosen = shape.iter().filter(|entry| entry["chosen"] == true);
        assert_eq!(chosen.count(), 1, "{shape:#?}");
        for entry in shape {
            let figure = |name: &str| entry[name].as_f64().unwrap();
            assert_eq!(entry["shape"], shape[0]["shape"]);
            // Small shapes are compared row by row, all of them.
            let rows = if entry["shape"]["q_len"] == 1 { 4 } else { 80 };
            assert_eq!(entry["rows"], rows);
            assert!((0.0..=1.0).contains(&figure("error")), "{entry:#}");
            let times = entry["times_ms"].as_array().unwrap();
            let mut times: Vec<f64> = times.iter().map(|t| t.as_f64().unwrap()).collect();
            times.sort_by(f64::total_cmp);
            assert_eq!(times.len(), 5);
            assert_eq!(entry["ms"]["median"], times[2]);
            // 4 B H Q K D, halved where causal.
            let flop = match entry["shape"]["k_len"].as_u64().unwrap() {
                40 => 2 * 2 * 40 * 40 * 16,
                keys => 4 * 4 * keys * 16,
            };
            let rate = flop as f64 / times[2] / 1e6;
            assert!((figure("gflops") / rate - 1.0).abs() < 1e-9, "{entry:#}");
        }
    }
    assert_eq!(found["refused"].as_array().unwrap().len(), 0);

    let lines = std::fs::read_to_string(&table).unwrap();
    let columns = |line: &str| {
        line.split('"')
            .step_by(2)
            .map(|s| s.matches(',').count())
            .sum()
    };
    let counts: Vec<usize> = lines.lines().map(columns).collect();
    assert_eq!(counts, [20; 10], "{lines}");

    // One file: nothing is fetched, and every shape is there.
    let html = std::fs::read_to_string(&page).unwrap();
    let links = html.replace("http://www.w3.org/2000/svg", "");
    for word in ["http", "src=", "<script", "url(", "@import", "<link"] {
        assert!(!links.contains(word), "{word}");
    }
    assert_eq!(html.matches("</svg>").count(), 3);
    assert!(html.matches("1,2,2,40,40,16,causal").count() >= 3);
    assert!(!html.contains("NaN"));
}

#[test]
fn what_a_route_cannot_do_is_said_and_the_rest_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("a.json");
    let said = stdout(&qkv(&[
        "bench",
        // More than 2^32 scores, which no kernel counts.
        "1,1,1,70000,70000,1",
        "1,1,1,1,64,4",
        "--routes",
        "three-pass",
        "--seconds",
        "0",
        "--json",
        report.to_str().unwrap(),
    ]));
    assert!(said.contains("in 32 bits"), "{said}");
    let found = json(&report);
    assert_eq!(found["refused"][0]["route"], "three-pass");
    assert_eq!(found["refused"][0]["shape"]["q_len"], 70000);
    assert_eq!(found["entries"][0]["shape"]["k_len"], 64);
}

#[test]
fn shapes_that_make_no_sense_are_refused() {
    for (shape, words) in [
        ("1,8,8,512,512", &["5 sizes", "B,H,Hk,Q,K,D"][..]),
        ("1,8,3,512,512,64", &["must divide H, 8"]),
        ("0,8,8,512,512,64", &["at least 1"]),
        ("1,8,8,512,512,999", &["D to 576"]),
        ("1,8,8,512,100,64,causal", &["rows without keys"]),
        ("1,8,8,512,512,64,bf17", &["bf17"]),
        ("65536,256,256,1024,1024,64", &["fewer than 2^32"]),
    ] {
        refuses(&qkv(&["bench", shape]), words);
    }
    refuses(&qkv(&["bench", "1,1,1,1,1,1", "--seconds", "-1"]), &["-1"]);
}

/// A report of one shape on two routes: medians and the distance between quartiles, in ms.
fn report(path: &Path, figures: [[f64; 2]; 2]) {
    let entry = |route: &str, [median, wide]: [f64; 2]| {
        serde_json::json!({
            "shape": { "batch": 1, "heads": 8, "kv_heads": 8, "q_len": 512, "k_len": 512, "dim": 64,
                "causal": true, "f16": false },
            "route": route, "plan": route, "chosen": route == "prefill", "ratio": null,
            "first_ms": 1.0, "host_ms": 1.0, "gflops": 1.0, "gb_s": 1.0, "share": 0.5, "error": 0.1,
            "rows": 1, "times_ms": [],
            "ms": { "median": median, "low": median - wide / 2.0, "high": median + wide / 2.0 },
        })
    };
    let all = serde_json::json!({
        "qkv": "0.1.0",
        "device": { "name": "none", "kind": "software", "backend": "vulkan", "driver": "none",
            "subgroups": null, "f16": false, "workgroup_memory": 16384, "max_binding": 1,
            "timestamps": true },
        "limits": { "f32": { "gflops": 1.0, "read_gb_s": 1.0, "copy_gb_s": 1.0 }, "f16": null },
        "entries": [entry("prefill", figures[0]), entry("decode", figures[1])],
        "refused": [],
    });
    std::fs::write(path, all.to_string()).unwrap();
}

#[test]
fn compare_tells_what_changed_beyond_the_noise_of_both() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a.json", "b.json"].map(|name| folder.path().join(name));
    let [a_name, b_name] = [&a, &b].map(|path| path.to_str().unwrap());
    for (before, after, prefill, decode) in [
        // 10 and 20 % away, with noise of 4 % each.
        (
            [[10.0, 0.4], [10.0, 0.4]],
            [[11.0, 0.44], [8.0, 0.32]],
            "slower",
            "faster",
        ),
        // 5 % away, and 15 % away with noise of 9 % each.
        (
            [[10.0, 0.4], [10.0, 0.9]],
            [[10.5, 0.4], [11.5, 1.0]],
            "1.050",
            "1.150",
        ),
        // Noise of 20 %, on one side.
        (
            [[10.0, 2.0], [10.0, 0.0]],
            [[99.0, 0.0], [10.1, 0.0]],
            "too noisy",
            "1.010",
        ),
    ] {
        report(&a, before);
        report(&b, after);
        let said = stdout(&qkv(&["compare", a_name, b_name]));
        let ends = |route: &str, word: &str| {
            let mut lines = said.lines().filter(|line| line.contains(route));
            lines.any(|line| match word.parse::<f64>() {
                Ok(_) => line.ends_with(word),
                Err(_) => line.contains(word),
            })
        };
        assert!(
            ends(" prefill ", prefill) && ends(" decode ", decode),
            "{said}"
        );
        assert!(!said.contains("not the same device"));
    }
    std::fs::write(&b, "{}").unwrap();
    refuses(&qkv(&["compare", a_name, b_name]), &["b.json", "no report"]);
    std::fs::remove_file(&b).unwrap();
    refuses(&qkv(&["compare", a_name, b_name]), &["b.json"]);
}

/// Compilers of software drivers take most of a minute for it.
#[test]
fn the_doctor_finds_nothing_wrong_and_reports_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.json");
    let output = qkv(&["doctor", "--report", path.to_str().unwrap()]);
    let said = stdout(&output);
    assert!(!said.contains("WRONG"), "{said}");
    let found = json(&path);
    let checks = found["checks"].as_array().unwrap();
    for check in checks {
        let error = check["worst_error"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&error), "{check:#}");
    }
    for route in ["three-pass", "prefill", "decode"] {
        for storage in ["f32", "bf16", "q8_0", "q4_0"] {
            let ran = |c: &&Value| c["route"] == route && c["kv_storage"] == storage;
            assert!(checks.iter().any(|c| ran(&c)), "{route} {storage}");
        }
    }
    let line = format!("{0} of {0} checks are right", checks.len());
    assert!(said.contains(&line), "{said}");
}
