//! Every case of ONNX's operator `Attention`, opsets 23 to 25, by `qkv attend`.
//!
//! The cases lie in tests/goldens/onnx/attention.safetensors, which make.py beside it made of the onnx
//! package: inputs, arguments of the program, expected outputs and how far off they may be.
#![cfg(feature = "cli")]

use std::path::Path;
use std::process::Command;

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::Value;

const CASES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/goldens/onnx/attention.safetensors"
);

fn qkv(arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
    let output = command.args(arguments).output().unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn floats(file: &SafeTensors, name: &str) -> (Vec<usize>, Vec<f32>) {
    let view = file.tensor(name).unwrap();
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    let values = view.data().as_chunks::<4>().0.iter();
    (
        view.shape().to_vec(),
        values.map(|&bytes| f32::from_le_bytes(bytes)).collect(),
    )
}

/// The largest difference in units of what is allowed, at most 1; infinities are equal or wrong.
fn compare(got: &[f32], want: &[f32], rtol: f64, atol: f64) -> Result<f64, String> {
    let mut worst = 0.0f64;
    for (at, (&a, &b)) in got.iter().zip(want).enumerate() {
        if a == b {
            continue;
        }
        let (a, b) = (f64::from(a), f64::from(b));
        let ratio = (a - b).abs() / (atol + rtol * b.abs());
        // A NaN or an infinity on one side is within nothing.
        if !b.is_finite() || ratio.is_nan() || ratio > 1.0 {
            return Err(format!(
                "element {at} is {a} for {b}, {ratio:.3} of what is allowed"
            ));
        }
        worst = worst.max(ratio);
    }
    Ok(worst)
}

/// Runs one case; the answer is the largest difference in units of what is allowed.
fn run(file: &SafeTensors, case: &Value, has_f16: bool, dir: &Path) -> Result<f64, String> {
    let name = case["name"].as_str().unwrap();
    let (input, output) = (dir.join("in.safetensors"), dir.join("out.safetensors"));
    let prefix = format!("{name}/");
    let all = file.tensors();
    let inputs = all.iter().filter_map(|(full, view)| {
        let own = full.strip_prefix(&prefix)?;
        (!["out", "weights"].contains(&own)).then_some((own, view))
    });
    safetensors::serialize_to_file(inputs, None, &input).unwrap();
    let args = case["args"]
        .as_array()
        .unwrap()
        .iter()
        .map(|arg| arg.as_str().unwrap());
    // What f16 holds, f32 holds too.
    let args = args.map(|arg| match (arg, has_f16) {
        ("--storage=f16", false) => "--storage=f32",
        _ => arg,
    });
    let (input, output) = (input.to_str().unwrap(), output.to_str().unwrap());
    let arguments: Vec<&str> = ["attend", input, "-o", output]
        .into_iter()
        .chain(args)
        .collect();
    qkv(&arguments)?;
    let bytes = std::fs::read(output).unwrap();
    std::fs::remove_file(output).unwrap();
    let answer = SafeTensors::deserialize(&bytes).unwrap();
    let (rtol, atol) = (
        case["rtol"].as_f64().unwrap(),
        case["atol"].as_f64().unwrap(),
    );
    let mut worst = 0.0f64;
    for result in ["out", "weights"] {
        let expected = format!("{name}/{result}");
        if !all.iter().any(|(full, _)| *full == expected) {
            assert!(answer.tensor(result).is_err(), "{expected} is not expected");
            continue;
        }
        let ((want_shape, want), (shape, got)) = (floats(file, &expected), floats(&answer, result));
        if shape != want_shape {
            return Err(format!("{result} is {shape:?}, not {want_shape:?}"));
        }
        let ratio = compare(&got, &want, rtol, atol).map_err(|e| format!("{result}: {e}"))?;
        worst = worst.max(ratio);
    }
    Ok(worst)
}

#[test]
fn every_case_of_onnx_passes() {
    let bytes = std::fs::read(CASES).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    let cases: Value = serde_json::from_str(&metadata["cases"]).unwrap();
    let devices = qkv(&["devices", "--json"]).unwrap();
    let mut devices = devices
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let device: Value = devices
        .find(|device: &Value| !device["chosen"].is_null())
        .unwrap();
    let has_f16 = device["f16"] == true;
    if !has_f16 {
        println!("this device has no f16: those cases are stored as f32");
    }

    let dir = tempfile::tempdir().unwrap();
    let (mut passed, mut wrong, mut worst) = (0, Vec::new(), 0.0f64);
    let cases = cases.as_array().unwrap();
    for case in cases {
        match run(&file, case, has_f16, dir.path()) {
            Ok(ratio) => {
                passed += 1;
                worst = worst.max(ratio);
            }
            Err(said) => wrong.push(format!("{}: {said}", case["name"])),
        }
    }
    println!(
        "passed {passed} of {}, worst {worst:.3} of what is allowed",
        cases.len()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!((passed, cases.len()), (93, 93));
}

#[test]
fn a_difference_is_objected_to() {
    let (inf, nan) = (f32::NEG_INFINITY, f32::NAN);
    assert!(compare(&[1.0, inf], &[1.0, inf], 0.0, 1e-7).is_ok());
    for (got, want) in [
        (1.1, 1.0),
        (inf, 0.0),
        (0.0, inf),
        (-inf, inf),
        (nan, 0.0),
        (0.0, nan),
    ] {
        assert!(
            compare(&[0.0, got], &[0.0, want], 1e-3, 1e-3).is_err(),
            "{got} {want}"
        );
    }
}
