//! `qkv attend` from outside: its results against its own oracle, what it prints, and how it refuses.
#![cfg(feature = "cli")]

mod desk;
mod refusals;

use std::process::Command;

use desk::{Desk, noise};
use safetensors::tensor::Dtype;
use serde_json::Value;

/// The same but for the rounding.
#[track_caller]
fn close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (a, b) in got.iter().zip(want) {
        assert!((a - b).abs() <= 2e-6, "{a} is not {b}");
    }
}

fn f16_is_there() -> bool {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
    let output = command.args(["devices", "--json"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut devices = text.lines().map(|line| serde_json::from_str(line).unwrap());
    devices.any(|device: Value| !device["chosen"].is_null() && device["f16"] == true)
}

const ROUTES: [&[&str]; 4] = [
    &[],
    &["--route", "three-pass"],
    &["--route", "prefill"],
    &["--route", "decode"],
];

#[test]
fn every_option_equals_the_oracle_on_every_route() {
    let bias = [0.5, -1.0, f32::NEG_INFINITY, -1e31, 0.25].repeat(3)[..13].to_vec();
    let mask = [1, 0, 9, 1, 1, 0, 255, 1, 1, 1, 0, 0, 1].to_vec();
    let masked = Desk::dense()
        .floats("bias", &[4, 1, 13], &bias.repeat(4))
        .with("mask", Dtype::U8, &[13], mask);
    let positions = Desk::dense()
        .integers("kv_len", &[13, 6])
        .integers("q_offset", &[3, -2])
        .integers("prefix_len", &[0, 2]);
    let relative = Desk::dense().noise("t5", &[8, 4]).noise("alibi", &[4]);
    let mut runs = 0;
    for (desk, arguments, rows) in [
        (Desk::dense(), vec![], 72),
        (Desk::dense(), vec!["--causal", "--align", "top-left"], 72),
        (Desk::dense(), vec!["--causal", "--window", "-1,-1"], 72),
        (
            Desk::dense(),
            vec!["--window", "2,-1", "--softcap", "0.5"],
            72,
        ),
        (
            Desk::dense().noise("sinks", &[4]),
            vec!["--window=3,1", "--scale", "-2"],
            72,
        ),
        (masked, vec![], 72),
        (positions, vec!["--causal", "--window=3,0"], 72),
        (relative, vec!["--t5-causal", "--t5-distance", "9"], 72),
        (Desk::dense().noise("t5", &[8, 4]), vec![], 72),
        (Desk::ragged(), vec!["--causal"], 36),
        (
            Desk::ragged().noise("bias", &[2, 1, 10, 14]),
            vec!["--window=4,1"],
            36,
        ),
        (Desk::dense().integers("kv_len", &[0, 0]), vec![], 72),
        (
            Desk::dense(),
            vec!["--no-subgroups", "--limits", "default"],
            72,
        ),
        (Desk::dense(), vec!["--storage", "bf16"], 72),
        (Desk::dense(), vec!["--kv-storage", "bf16", "--no-f16"], 72),
    ] {
        for route in ROUTES {
            desk.verified(&[&arguments[..], route].concat(), rows);
            runs += 1;
        }
    }
    for arguments in [
        &["--deterministic", "batch"][..],
        &["--route=decode", "--splits=3"],
    ] {
        let long = Desk::new().noise("q", &[2, 2, 3, 8]);
        let long = long.noise("k", &[2, 1, 300, 8]).noise("v", &[2, 1, 300, 8]);
        long.verified(arguments, 12);
        runs += 1;
    }
    // Keys and values in blocks.
    let wide = || {
        let wide = Desk::new().noise("q", &[2, 4, 5, 32]);
        wide.noise("k", &[2, 2, 40, 32]).noise("v", &[2, 2, 40, 64])
    };
    for storage in ["q8_0", "q4_0"] {
        for route in ROUTES {
            wide().verified(
                &[&["--causal", "--kv-storage", storage][..], route].concat(),
                40,
            );
            runs += 1;
        }
    }
    println!("{runs} runs");
    assert_eq!(runs, 15 * 4 + 2 + 8);
    Desk::dense().refused(
        &["--kv-storage", "q8_0"],
        &["--kv-storage", "q8_0 for k", "blocks of 32"],
    );
}

#[test]
fn f16_is_stored_where_the_device_has_it() {
    match f16_is_there() {
        true => {
            Desk::dense().verified(&["--storage", "f16"], 72);
            Desk::dense().verified(&["--kv-storage", "f16"], 72);
        }
        false => println!("this device has no f16"),
    }
    let words = ["f16", "no f16 in shaders"];
    Desk::dense().refused(&["--storage", "f16", "--no-f16"], &words);
    Desk::dense().refused(&["--kv-storage", "f16", "--limits", "default"], &words);
}

#[test]
fn every_stage_of_the_weights_equals_the_oracle() {
    for stage in ["raw", "softcap", "biased", "softmax"] {
        for (desk, rows, shape) in [
            (
                Desk::dense().integers("kv_len", &[13, 6]),
                72,
                vec![2, 4, 9, 13],
            ),
            (Desk::ragged(), 36, vec![4, 10, 14]),
        ] {
            let arguments = ["--weights", stage, "--softcap", "0.5", "--causal"];
            desk.verified(&arguments, rows);
            let (_, tensors) = desk.good(&arguments);
            assert_eq!(tensors["weights"].0, shape);
        }
    }
}

/// `[B, L, H, D]` of `[B, H, L, D]`.
fn transposed(values: &[f32], [b, h, l, d]: [usize; 4]) -> Vec<f32> {
    let mut out = Vec::new();
    for b in 0..b {
        for i in 0..l {
            for h_ in 0..h {
                out.extend_from_slice(&values[((b * h + h_) * l + i) * d..][..d]);
            }
        }
    }
    out
}

#[test]
fn the_other_layout_is_the_same_problem() {
    let [q, k, v] = [[2, 4, 9, 8], [2, 2, 13, 8], [2, 2, 13, 6]];
    let values = [q, k, v].map(|shape| noise(shape[3] as u64, shape.iter().product()));
    let mut ours = Desk::new();
    let mut theirs = Desk::new();
    for ((name, shape), values) in ["q", "k", "v"].into_iter().zip([q, k, v]).zip(&values) {
        let [b, h, l, d] = shape;
        ours = ours.floats(name, &shape, values);
        theirs = theirs.floats(name, &[b, l, h, d], &transposed(values, shape));
    }
    let arguments = ["--causal", "--lse", "--weights", "softmax"];
    let (_, ours) = ours.good(&arguments);
    theirs.verified(&["--layout", "blhd", "--causal"], 72);
    let (_, theirs) = theirs.good(&[&["--layout", "blhd"], &arguments[..]].concat());
    assert_eq!(ours.len(), 3);
    for (name, (shape, values)) in &ours {
        let (same_shape, same) = &theirs[name];
        match name.as_str() {
            "out" => {
                assert_eq!(
                    (&shape[..], &same_shape[..]),
                    (&[2, 4, 9, 6][..], &[2, 9, 4, 6][..])
                );
                assert_eq!(&transposed(values, [2, 4, 9, 6]), same);
            }
            _ => assert_eq!((shape, values), (same_shape, same)),
        }
    }
    // Ragged rows, [T, H, D].
    let desk = Desk::new().noise("q", &[10, 4, 8]).noise("k", &[14, 2, 8]);
    let desk = desk.noise("v", &[14, 2, 6]).integers("cu_q", &[1, 4, 9]);
    let desk = desk.integers("cu_k", &[0, 5, 14]);
    desk.verified(&["--layout", "blhd"], 32);
    let (_, tensors) = desk.good(&["--layout", "blhd"]);
    let (shape, values) = &tensors["out"];
    assert_eq!(*shape, [10, 4, 6]);
    assert_eq!(values[..24], [0.0; 24], "row 0 is in no sequence");
}

#[test]
fn every_type_of_number_is_read() {
    let halves: Vec<f32> = (0..576).map(|n| (n % 13) as f32 * 0.25 - 1.5).collect();
    let want = Desk::dense().floats("q", &[2, 4, 9, 8], &halves);
    let want = want.integers("kv_len", &[13, 6]).out(&[]);
    let narrow = |digits: u32| -> Vec<u8> {
        // Few digits: the upper half of the f32, or the f16 made of its parts.
        let bits = halves.iter().map(|x| match (digits, x.to_bits()) {
            (8, bits) => (bits >> 16) as u16,
            (_, 0) => 0,
            (_, bits) => {
                let exponent = ((bits >> 23) & 255) + 15 - 127;
                (bits >> 31 << 15 | exponent << 10 | bits >> 13 & 0x3ff) as u16
            }
        });
        bits.flat_map(u16::to_le_bytes).collect()
    };
    let doubles = halves
        .iter()
        .flat_map(|&x| f64::from(x).to_le_bytes())
        .collect();
    for (dtype, bytes) in [
        (Dtype::F16, narrow(11)),
        (Dtype::BF16, narrow(8)),
        (Dtype::F64, doubles),
    ] {
        let desk = Desk::dense().with("q", dtype, &[2, 4, 9, 8], bytes);
        assert_eq!(
            desk.integers("kv_len", &[13, 6]).out(&[]),
            want,
            "{dtype:?}"
        );
    }
    for (dtype, size) in [
        (Dtype::U8, 1),
        (Dtype::I8, 1),
        (Dtype::I16, 2),
        (Dtype::U16, 2),
        (Dtype::I32, 4),
        (Dtype::U32, 4),
        (Dtype::U64, 8),
    ] {
        let lengths = [13u64, 6]
            .iter()
            .flat_map(|n| n.to_le_bytes()[..size].to_vec());
        let desk = Desk::dense().floats("q", &[2, 4, 9, 8], &halves);
        let desk = desk.with("kv_len", dtype, &[2], lengths.collect());
        assert_eq!(desk.out(&[]), want, "{dtype:?}");
    }
    let negative = (-2i16).to_le_bytes().repeat(2);
    let offset = Desk::dense().with("q_offset", Dtype::I16, &[2], negative);
    offset.verified(&["--causal"], 72);
}

#[test]
fn alibi_and_masks_in_wgsl_are_the_options() {
    let square = || {
        let desk = Desk::new().noise("q", &[2, 4, 9, 8]);
        desk.noise("k", &[2, 2, 9, 8]).noise("v", &[2, 2, 9, 6])
    };
    let alibi = "// Press et al. 2022.
        fn score_mod(score: f32, b: u32, h: u32, q: u32, k: u32) -> f32 {
            return score - slopes[h] * abs(f32(q) - f32(k));
        }";
    let causal = "fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool { return k <= q; }";
    for route in ROUTES {
        for (option, arguments, function, ours) in [
            (
                square().noise("alibi", &[4]),
                &[][..],
                alibi,
                ["--score-mod", "mod.wgsl"],
            ),
            (square(), &["--causal"], causal, ["--mask-mod", "mod.wgsl"]),
        ] {
            let want = option.out(&[arguments, route].concat());
            let (_, _, _, slopes) = square().noise("alibi", &[4]).tensors.pop().unwrap();
            let desk = square().wgsl(function);
            let desk = match function == alibi {
                true => desk.with("slopes", Dtype::F32, &[4], slopes),
                false => desk,
            };
            let got = desk.out(&[&ours[..], route].concat());
            close(&got, &want);
            assert_ne!(want, square().out(route), "the option does something");
        }
    }
}

#[test]
fn a_wrong_row_is_named_and_ends_with_1() {
    let mut q = noise(1, 2 * 4 * 9 * 8);
    q[(9 * 4 + 9 * 2 + 5) * 8] = f32::NAN;
    let desk = Desk::dense().floats("q", &[2, 4, 9, 8], &q);
    let output = desk.run(&["--verify"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let says = "out: 1 of 72 rows are wrong; first batch 1 head 2 query 5 column 0";
    assert!(said.contains(says), "{said}");
    assert!(output.stdout.is_empty() && desk.path("out.safetensors").exists());
}

#[test]
fn explain_prints_the_plan() {
    let (said, _) = Desk::dense().good(&["--explain", "--weights", "raw"]);
    for says in [
        "route       three-pass\n",
        "splits      1 of 13 keys\n",
        // The weights themselves: B H Q K.
        "scratch     3744 bytes\n",
        "launches    3, ",
        "scores ",
        "softmax 72\n",
        "values ",
    ] {
        assert!(said.contains(says), "{says:?} is not in: {said}");
    }
    let long = Desk::new().noise("q", &[1, 2, 1, 8]);
    let long = long.noise("k", &[1, 2, 300, 8]).noise("v", &[1, 2, 300, 8]);
    let (said, _) = long.good(&["--explain", "--route", "decode", "--splits", "2"]);
    for says in [
        "route       decode\n",
        "splits      2 of 192 keys\n",
        "merge ",
    ] {
        assert!(said.contains(says), "{says:?} is not in: {said}");
    }
    let (said, _) = Desk::ragged().good(&["--explain"]);
    for says in [
        "route       prefill\n",
        "short       decode",
        "queries at most\n",
    ] {
        assert!(said.contains(says), "{says:?} is not in: {said}");
    }
    // Nothing but the plan is wanted: nothing runs.
    let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
    let command = command.arg("attend").arg(long.path("in.safetensors"));
    let output = command.arg("--explain").output().unwrap();
    assert!(output.status.success());
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("route       decode\n")
    );
}

#[test]
fn time_prints_one_line_of_json() {
    for (arguments, clock) in [(&[][..], None), (&["--limits", "default"], Some("host"))] {
        let (said, _) = Desk::dense().good(&[&["--time", "3"], arguments].concat());
        assert_eq!(said.lines().count(), 1);
        let json: Value = serde_json::from_str(&said).unwrap();
        let times = json["times_ms"].as_array().unwrap();
        assert_eq!(times.len(), 3);
        let measured = times.iter().chain([&json["first_ms"], &json["host_ms"]]);
        for ms in measured {
            assert!(ms.as_f64().unwrap() > 0.0, "{said}");
        }
        assert!(clock.is_none_or(|clock| json["clock"] == clock), "{said}");
    }
}
