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
        "1,4,2,1,300,16",
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
            // 4 B H D for each pair of a query and a key that it sees.
            let flop = match entry["shape"]["k_len"].as_u64().unwrap() {
                40 => 4 * 2 * (40 * 41 / 2) * 16,
                keys => 4 * 4 * keys * 16,
            };
            let rate = flop as f64 / times[2] / 1e6;
            assert!((figure("gflops") / rate - 1.0).abs() < 1e-9, "{entry:#}");
        }
    }
    assert_eq!(found["refused"].as_array().unwrap().len(), 0);

    // Measured twice, and a share only of what both agree on.
    let reads = &found["limits"]["f32"];
    assert!(said.contains("the better of before and after:"), "{said}");
    for entry in entries {
        let noise = match entry["shape"]["q_len"] == 1 {
            true if found["limits"]["f16"]["read_gb_s"].as_f64() > reads["read_gb_s"].as_f64() => {
                &found["limits"]["f16"]["noise"][1]
            }
            true => &reads["noise"][1],
            false => &reads["noise"][0],
        };
        let noise = noise.as_f64().unwrap();
        assert!((0.0..1.0).contains(&noise), "{found:#}");
        assert!(noise <= 0.1 || entry["limit_noisy"] == true, "{entry:#}");
        let is_silent = entry["limit_noisy"] == true;
        assert_eq!(entry["share"].is_null(), is_silent, "{entry:#}");
    }

    let lines = std::fs::read_to_string(&table).unwrap();
    let columns = |line: &str| {
        line.split('"')
            .step_by(2)
            .map(|s| s.matches(',').count())
            .sum()
    };
    let counts: Vec<usize> = lines.lines().map(columns).collect();
    assert_eq!(counts, [24; 10], "{lines}");

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
fn what_the_plan_takes_is_timed_beside_forced_routes_that_are_not_it() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("a.json");
    stdout(&qkv(&[
        "bench",
        "1,4,2,1,4096,16",
        "--routes",
        "three-pass",
        "--seconds",
        "0",
        "--json",
        report.to_str().unwrap(),
    ]));
    let found = json(&report);
    let entries = found["entries"].as_array().unwrap();
    let [forced, chosen] = entries.as_slice() else {
        panic!("{found:#}");
    };
    assert_eq!(
        [&forced["chosen"], &chosen["chosen"]].map(Value::as_bool),
        [Some(false), Some(true)]
    );
    assert_eq!(forced["candidate"], "three-pass");
    let candidate = chosen["candidate"].as_str().unwrap();
    assert!(candidate.starts_with("decode"), "{candidate}");
}

#[test]
fn what_a_route_cannot_do_is_said_and_the_rest_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("a.json");
    let said = stdout(&qkv(&[
        "bench",
        // 16 GB, and as many on the host, which are not asked for.
        "1,1,1,7000000,1,576",
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
    assert_eq!(found["refused"][0]["route"], "all");
    let why = found["refused"][0]["why"].as_str().unwrap();
    assert!(why.starts_with("q is 16128000000 bytes "), "{why}");
    assert_eq!(found["refused"][1]["route"], "three-pass");
    assert_eq!(found["refused"][1]["shape"]["q_len"], 70000);
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

/// Peers that speak their protocol and need nothing: `python FILE NAME PACKAGE...`. What they compute is
/// attention over one key, whose value is the answer; each does something else with it.
#[cfg(unix)]
mod peers {
    use super::*;

    const FAKE: &str = r#"#!/bin/sh
here=${0%/*}
case $2 in ggml) [ -e "$here/lacking" ] && { echo '{"missing": ["this", "that"]}'; exit; } ;; esac
echo '{"missing": []}'
read -r line || exit 0
field() { printf '%s\n' "$line" | sed "s/.*\"$1\":\"\([^\"]*\)\".*/\1/"; }
input=$(field input) output=$(field output)
case $line in *'"causal":true'*) causal=1 ;; *) causal= ;; esac
[ "$2$causal" = ggml1 ] && { printf '%s\n' '{"failed": "a line\n  and another"}'; exit; }
printf '%s\n' '{"first_ms": 7, "about": {"version": "1.2", "device": "a \"fake\""}}'
times=
while read -r line && [ "$line" = '"call"' ]; do
  [ "$2$causal" = ort1 ] && { echo $$ >"$here/hangs"; exec sleep 60; }
  # After ort's turn, which has failed by then.
  [ "$2" = torch ] && [ -e "$here/hangs" ] && kill -0 "$(cat "$here/hangs")" && : >"$here/beside"
  [ "$2$causal" = torch1 ] && { echo 'it is no more' >&2; exit 3; }
  times="$times${times:+, }2.5"
  echo '{}'
done
# In the file, v is last. torch is right, ort wrong, ggml no number.
cat "$here/header" >"$output"
case $2 in
  torch) tail -c 16 "$input" >>"$output" ;;
  ort) printf '0000000000000000' >>"$output" ;;
  ggml) printf '\377\377\377\377\377\377\377\377\377\377\377\377\377\377\377\377' >>"$output" ;;
esac
echo "{\"clock\": \"host\", \"times_ms\": [$times${SPOILT}]}"
"#;

    /// The script, and a header of the answer's file.
    fn fake() -> (tempfile::TempDir, String) {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fake");
        std::fs::write(&path, FAKE).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
        let header = r#"{"out":{"dtype":"F32","shape":[1,1,1,4],"data_offsets":[0,16]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        std::fs::write(folder.path().join("header"), bytes).unwrap();
        let path = path.to_str().unwrap().to_string();
        (folder, path)
    }

    #[test]
    fn right_wrong_and_failing_ones_are_shown_as_such() {
        let (folder, fake) = fake();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
        let [report, table, page] = ["a.json", "a.csv", "a.html"].map(path);
        let said = stdout(&qkv(&[
            "bench",
            "1,1,1,1,1,4",
            "1,1,1,1,1,4,causal",
            "--peers=torch,ort,ggml",
            "--python",
            &fake,
            "--peer-timeout",
            "2",
            "--seconds",
            "0",
            "--json",
            &report,
            "--csv",
            &table,
            "--html",
            &page,
        ]));
        let found = json(Path::new(&report));
        let of = |list: &str, route: &str, causal: bool| {
            let own = found[list].as_array().unwrap().iter();
            let mut own = own.filter(|e| e["route"] == route && e["shape"]["causal"] == causal);
            own.next()
                .unwrap_or_else(|| panic!("{list} {route}: {found:#}"))
                .clone()
        };
        let [torch, ort] = ["torch", "ort"].map(|name| of("entries", name, false));
        assert_eq!(torch["peer"]["right"], true);
        assert_eq!(torch["error"], 0.0);
        assert_eq!(torch["ms"]["median"], 2.5);
        assert_eq!(torch["first_ms"], 7.0);
        assert_eq!(torch["times_ms"].as_array().unwrap().len(), 5);
        assert_eq!(torch["peer"]["about"]["version"], "1.2");
        assert_eq!(torch["peer"]["timestamps"], false);
        // Ours by that clock too, which the ratio is to.
        let ours = torch["peer"]["ours_waited_ms"].as_f64().unwrap();
        assert!(ours > 0.0 && ours < 1e4, "{torch:#}");
        if let Some(ratio) = torch["ratio"].as_f64() {
            assert!((ratio * ours / 2.5 - 1.0).abs() < 0.2, "{torch:#}");
        }
        assert_eq!(ort["peer"]["right"], false);
        assert!(ort["error"].as_f64().unwrap() > 100.0);
        // What is wrong is compared with nothing.
        assert_eq!(ort["ratio"], Value::Null);
        // What gave no answer computes no longer beside what came after it.
        assert!(folder.path().join("hangs").exists() && !folder.path().join("beside").exists());
        for (name, causal, why) in [
            ("ggml", false, "WRONG: its answer has a value of NaN"),
            ("ggml", true, "a line and another"),
            ("torch", true, "it ended, exit status: 3: it is no more"),
            ("ort", true, "no answer in 2 s"),
        ] {
            assert_eq!(of("refused", name, causal)["why"], why);
            assert!(said.contains(why), "{said}");
            for file in [&table, &page] {
                let text = std::fs::read_to_string(file).unwrap();
                assert!(text.contains(why), "{why}: {text}");
            }
        }
        let line = |name: &str| said.lines().find(|line| line.contains(name)).unwrap();
        assert!(line(" torch ").contains("1.2, a \"fake\", by the host's clock"));
        assert!(!line(" torch ").contains("WRONG"));
        assert!(line(" ort ").contains("WRONG, off by "), "{said}");
        let html = std::fs::read_to_string(&page).unwrap();
        assert!(html.contains("WRONG, off by "), "{html}");
    }

    #[test]
    fn peers_that_cannot_run_here_are_refused() {
        let (folder, fake) = fake();
        let bench = |more: &[&str]| qkv(&[&["bench", "1,1,1,1,1,4"], more].concat());
        let nowhere = folder.path().join("nowhere");
        let nowhere = nowhere.to_str().unwrap();
        refuses(
            &bench(&["--peers", "--python", nowhere]),
            &[
                "--python is ",
                "nowhere",
                "--peers=ort,torch",
                "pip install numpy safetensors onnx onnxruntime-webgpu torch",
            ],
        );
        refuses(
            &bench(&["--peers=burn", "--burn", nowhere]),
            &[
                "--burn is ",
                "nowhere",
                "cargo install --path benches/peers/burn",
            ],
        );
        // A program of another kind.
        refuses(
            &bench(&["--peers=torch", "--python", "/bin/echo"]),
            &["it answers \"/", "pip install"],
        );
        refuses(
            &bench(&["--peers=torch", "--python", "false"]),
            &["it ended, exit status: 1"],
        );
        refuses(&bench(&["--peers=caffe"]), &["caffe", "ort"]);
        refuses(&bench(&["--burn", &fake]), &["--peers"]);
        std::fs::write(folder.path().join("lacking"), "").unwrap();
        refuses(
            &bench(&["--peers=ggml,torch", "--python", &fake]),
            &["it lacks that, this; ", "pip install", "loom-py-rt=="],
        );
    }

    #[test]
    fn times_that_cannot_be_are_not_believed() {
        let (folder, fake) = fake();
        let report = folder.path().join("a.json");
        for (spoilt, why) in [
            (", 1", "it gave 6 times for 5 calls"),
            (", \"x\"", "it answers "),
        ] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
            command.env("SPOILT", spoilt);
            command.args(["bench", "1,1,1,1,1,4", "--peers=torch", "--seconds", "0"]);
            command.args(["--python", &fake, "--json", report.to_str().unwrap()]);
            stdout(&command.output().unwrap());
            let said = json(&report)["refused"][0]["why"].to_string();
            assert!(said.contains(why), "{said}");
        }
    }
}

/// A reader that goes away, as `head` does, takes neither the files nor the exit code with it.
#[test]
fn what_nobody_reads_any_more_still_has_its_files_and_exit_code() {
    use std::process::Stdio;
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("a.html");
    let run = |shape: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
        command.args(["bench", shape, "--seconds", "0", "--html"]);
        let piped = command.arg(&page).stdout(Stdio::piped());
        let mut child = piped.stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        child.wait_with_output().unwrap()
    };
    let output = run("1,1,1,1,64,4");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(
        std::fs::read_to_string(&page)
            .unwrap()
            .contains("1,1,1,1,64,4")
    );
    // Here it has not said a word yet, and cannot write the page.
    std::fs::remove_file(&page).unwrap();
    std::fs::create_dir(&page).unwrap();
    refuses(&run("1,1,1,1,64,4"), &["a.html"]);
}

#[test]
fn options_that_a_command_would_not_heed_are_refused() {
    for (command, option, words) in [
        (
            &["compare", "a", "b"][..],
            &["--device", "0"][..],
            "--device is 0: not with `qkv compare`",
        ),
        (
            &["compare", "a", "b"],
            &["--no-tune"],
            "--no-tune is given: not with `qkv compare`",
        ),
        (
            &["devices"],
            &["--no-tune"],
            "--no-tune is given: not with `qkv devices`",
        ),
        (
            &["doctor"],
            &["--no-tune"],
            "--no-tune is given: not with `qkv doctor`",
        ),
    ] {
        refuses(&qkv(&[command, option].concat()), &[words]);
    }
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
    // The plan of a route that changed is beside what it was; the same one first, if both are there.
    let name = |path: &Path, names: [(&str, &str, bool); 2]| {
        report(path, [[10.0, 0.0], [20.0, 0.0]]);
        let mut found = json(path);
        for (ix, (route, candidate, tuned)) in names.into_iter().enumerate() {
            let entry = &mut found["entries"][ix];
            entry["route"] = route.into();
            entry["candidate"] = candidate.into();
            entry["tuned"] = tuned.into();
        }
        std::fs::write(path, found.to_string()).unwrap();
    };
    name(&a, [("decode", "four", false), ("prefill", "x", false)]);
    name(&b, [("decode", "eight", true), ("decode", "four", false)]);
    let said = stdout(&qkv(&["compare", a_name, b_name]));
    assert!(said.contains("2.000  slower\n"), "{said}");
    assert!(said.contains(" 2 in one run only"), "{said}");
    name(&b, [("decode", "eight", true), ("prefill", "x", false)]);
    let said = stdout(&qkv(&["compare", a_name, b_name]));
    assert!(said.contains("1.000  four before, eight after\n"), "{said}");
    assert!(said.contains(" 0 in one run only"), "{said}");
    // What is wrong is neither faster nor slower, nor is what other clocks say.
    let figures = [[10.0, 0.0], [10.0, 0.0]];
    report(&a, figures);
    report(&b, [[20.0, 0.0], [5.0, 0.0]]);
    let [before, mut after] = [&a, &b].map(|path| json(path));
    after["entries"][0]["peer"] = serde_json::json!({ "about": {}, "timestamps": true,
        "max_error": 1.0, "rms_error": 1.0, "right": false });
    after["device"]["max_binding"] = 2.into();
    after["device"]["driver"] = "some".into();
    std::fs::write(&b, after.to_string()).unwrap();
    let said = stdout(&qkv(&["compare", a_name, b_name]));
    assert!(said.contains("2.000  an answer is WRONG\n"), "{said}");
    assert!(said.contains("0.500  faster\n"), "{said}");
    assert!(
        said.contains("1 faster, 0 slower, 0 the same within noise, 0 too noisy, 1 wrong, 0 by other clocks, 0 in one"),
        "{said}"
    );
    for line in [
        "not the same device:\n",
        "  driver: \"none\" before, \"some\" after\n",
        "  max_binding: 1 before, 2 after\n",
    ] {
        assert!(said.contains(line), "{said}");
    }
    after["device"] = before["device"].clone();
    after["device"]["timestamps"] = false.into();
    std::fs::write(&b, after.to_string()).unwrap();
    let said = stdout(&qkv(&["compare", a_name, b_name]));
    assert!(said.contains("0.500  not by the same clock\n"), "{said}");
    assert!(said.contains("0 faster, 0 slower"), "{said}");
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
    let ran = |key: &str, value: Value, storage: &str| {
        let is = |c: &Value| c[key] == value && c["storage"] == storage;
        checks.iter().any(is)
    };
    assert!(ran("problem", "product".into(), "f32"));
    // Products in f16 are looked at wherever f16 is.
    assert_eq!(
        ran("f16_math", true.into(), "f16"),
        ran("problem", "product".into(), "f16")
    );
    assert!(found["ended"].is_null(), "{}", found["ended"]);
    let line = format!("{0} of {0} checks are right", checks.len());
    assert!(said.contains(&line), "{said}");
}
