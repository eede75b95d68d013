//! What `qkv attend` refuses: exit code 2, the argument, its value and the bound, and no file.

use std::process::Command;

use safetensors::tensor::Dtype;

use super::close;
use super::desk::Desk;

#[test]
fn shapes_that_do_not_agree_are_refused() {
    let dense = Desk::dense;
    for (desk, words) in [
        (
            dense().noise("k", &[2, 2, 13, 9]),
            &["k's head dim", "9", "8"][..],
        ),
        (
            dense().noise("v", &[2, 2, 12, 6]),
            &["v is [2, 2, 12, 6]", "[2, 2, 13, 8]"],
        ),
        (dense().noise("q", &[3, 4, 9, 8]), &["batch", "2", "3"]),
        (
            dense().noise("q", &[2, 0, 9, 8]),
            &["q is [2, 0, 9, 8]", "heads", "zero"],
        ),
        (
            dense().noise("q", &[2, 5, 9, 8]),
            &["heads", "2", "divide", "5"],
        ),
        (
            dense().noise("q", &[4, 9, 8]),
            &["q is [4, 9, 8]", "four axes"],
        ),
        (dense().without("k"), &["in.safetensors", "no tensor k"]),
        (
            dense().noise("bias", &[2, 1, 9, 12]),
            &["bias is [2, 1, 9, 12]", "[2, 4, 9, 13]"],
        ),
        (
            dense().noise("bias", &[1, 1, 1, 9, 13]),
            &["bias", "broadcast"],
        ),
        (
            dense().with("mask", Dtype::BOOL, &[12], vec![1; 12]),
            &["mask is [12]", "broadcast"],
        ),
        (dense().noise("mask", &[13]), &["mask is F32", "BOOL or U8"]),
        (dense().noise("sinks", &[3]), &["sinks", "[3]", "[4]"]),
        (dense().noise("alibi", &[2]), &["alibi", "[2]", "[4]"]),
        (
            dense().noise("t5", &[8, 3]),
            &["t5", "[8, 3]", "[buckets, 4]"],
        ),
        (
            dense().integers("kv_len", &[1, 2, 3]),
            &["kv_len", "[3]", "[2]"],
        ),
        (
            dense().integers("kv_len", &[1, 14]),
            &["kv_len is 14 at 1", "from 0 to 13"],
        ),
        (
            dense().integers("kv_len", &[-1, 1]),
            &["kv_len is -1 at 0", "from 0 to 13"],
        ),
        (
            dense().integers("prefix_len", &[1, 99]),
            &["prefix_len is 99 at 1", "13"],
        ),
        (
            dense().integers("q_offset", &[1, 1 << 40]),
            &["q_offset", "at 1", "536870912"],
        ),
        (
            dense().noise("q_offset", &[2]),
            &["q_offset is F32", "integers"],
        ),
        (
            dense().noise("stranger", &[2]),
            &["in.safetensors is stranger", "--score-mod"],
        ),
    ] {
        desk.refused(&[], words);
    }
}

#[test]
fn sequences_that_do_not_follow_each_other_are_refused() {
    let ragged = Desk::ragged;
    for (desk, words) in [
        (
            ragged().integers("cu_q", &[0, 4, 3]),
            &["cu_q is 3 behind 4 at 2", "rise"][..],
        ),
        (
            ragged().integers("cu_q", &[0, 4, 11]),
            &["cu_q is 11 at its end", "at most the 10"],
        ),
        (
            ragged().integers("cu_q", &[-1, 4, 9]),
            &["cu_q is -1 at 0", "from 0"],
        ),
        (
            ragged().integers("cu_k", &[0, 13, 5]),
            &["cu_k is 5 behind 13", "rise"],
        ),
        (
            ragged().integers("cu_k", &[0, 4, 15]),
            &["cu_k is 15 at its end", "at most the 14"],
        ),
        (ragged().integers("cu_k", &[0, 4]), &["batch", "1", "2"]),
        (
            ragged().integers("cu_q", &[]),
            &["cu_q", "at least one sequence"],
        ),
        (
            ragged().integers("kv_len", &[1, 1]),
            &["kv_len", "not with cu_k"],
        ),
        (ragged().without("cu_q"), &["q is [4, 10, 8]", "four axes"]),
        (
            ragged().noise("q", &[1, 4, 10, 8]),
            &["q is [1, 4, 10, 8]", "three axes"],
        ),
    ] {
        desk.refused(&[], words);
    }
}

#[test]
fn options_out_of_range_are_refused() {
    for (arguments, words) in [
        (&["--scale", "nan"][..], &["scale is NaN", "finite"][..]),
        (&["--softcap", "-1"], &["softcap is -1", "above zero"]),
        (&["--softcap", "inf"], &["softcap is inf", "finite"]),
        (
            &["--window", "-2,0"],
            &["--window is -2,0", "from 0 to 536870912"],
        ),
        (&["--window", "3"], &["--window is 3", "LEFT,RIGHT"]),
        (&["--window", "1,2", "--causal"], &["window", "2", "causal"]),
        (
            &["--route", "prefill", "--splits", "2"],
            &["splits is 2", "only the decode route"],
        ),
        (
            &["--route", "decode", "--splits", "0"],
            &["splits is 0", "at least 1"],
        ),
        (
            &["--route", "decode", "--weights", "raw"],
            &["route is Decode", "three-pass"],
        ),
        (&["--t5-causal"], &["--t5-causal", "tensor t5"]),
        (
            &["--t5-distance", "9"],
            &["--t5-distance is 9", "tensor t5"],
        ),
        (&["--score-mod", "none.wgsl"], &["none.wgsl"]),
        (
            &["--verify", "--mask-mod", "none.wgsl"],
            &["--verify", "--mask-mod"],
        ),
    ] {
        Desk::dense().refused(arguments, words);
    }
    let near = ["--t5-distance", "2"];
    Desk::dense()
        .noise("t5", &[8, 4])
        .refused(&near, &["max_distance is 2", "2 buckets"]);
    // The parser of arguments answers in more lines than one.
    for (arguments, words) in [
        (["--time", "0"], ["--time", "1..=1000000"]),
        (["--layout", "bdlh"], ["--layout", "bhld, blhd"]),
        (["--scale", "one"], ["--scale", "invalid float"]),
    ] {
        let output = Desk::dense().run(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2));
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
}

#[test]
fn wgsl_that_no_kernel_can_bear_is_refused_at_its_line() {
    let head = "fn score_mod(score: f32, b: u32, h: u32, q: u32, k: u32) -> f32";
    for (text, words) in [
        (
            format!("// one\n{head} {{\n  return scor;\n}}"),
            &["score_mod", "line 3", "scor"][..],
        ),
        (
            format!("{head} {{\n  return score +;\n}}"),
            &["score_mod", "line 2", "expression"],
        ),
        (
            format!("{head} {{\n  return score * slopes[h];\n}}"),
            &["line 2", "slopes"],
        ),
        (
            format!("{head} {{\n  workgroupBarrier();\n  return score;\n}}"),
            &["score_mod", "barrier", "plain functions"],
        ),
        (
            head.replace("score_mod", "other") + " { return 0.0; }",
            &["score_mod", head],
        ),
        (String::new(), &["score_mod", head]),
    ] {
        let desk = Desk::dense().wgsl(&text);
        desk.refused(&["--score-mod", "mod.wgsl"], words);
    }
    let good = format!("{head} {{ return score; }}");
    let desk = || Desk::dense().wgsl(&good).noise("slopes", &[4]);
    close(
        &desk().out(&["--score-mod", "mod.wgsl"]),
        &Desk::dense().out(&[]),
    );
    for (desk, words) in [
        (
            desk().integers("table", &[1]),
            ["table is I64", "F32, I32 or U32"],
        ),
        (desk().noise("rows", &[2]), ["extra buffer's name", "rows"]),
        (
            desk().noise("x", &[2]).noise("y", &[2]),
            ["extra", "at most two"],
        ),
    ] {
        desk.refused(&["--score-mod", "mod.wgsl"], &words);
    }
}

#[test]
fn files_that_cannot_be_read_or_written_are_named() {
    let attend = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
        let output = command.arg("attend").args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let desk = Desk::dense();
    desk.good(&[]);
    let (input, bad) = (desk.path("in.safetensors"), desk.path("bad.safetensors"));
    let input = input.to_str().unwrap();
    let bytes = std::fs::read(input).unwrap();
    std::fs::write(&bad, &bytes[..bytes.len() - 1]).unwrap();
    let said = attend(&[bad.to_str().unwrap(), "-o", "/dev/null"]);
    assert!(
        said.contains("bad.safetensors") && said.contains("safetensors file"),
        "{said}"
    );
    let said = attend(&["none.safetensors", "-o", "out.safetensors"]);
    assert!(said.contains("none.safetensors"), "{said}");
    let said = attend(&[input, "-o", "/no/such/out.safetensors"]);
    assert!(said.contains("/no/such/out"), "{said}");
    let said = attend(&[input]);
    assert!(said.contains("--output"), "{said}");
}
