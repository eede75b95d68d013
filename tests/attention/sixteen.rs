//! Errors in 16-bit types beside those of eager PyTorch in the same type.

use qkv::gpu::templates;

use super::*;

fn cases(dtype: DType) -> Vec<Case> {
    let plain = |len, dim| Case {
        types: [dtype; 4],
        ..Case::new([2, 2], [4, 2], len, dim)
    };
    let mut cases = Vec::new();
    for dim in [[12, 20], [33, 7], [64, 64], [128, 128]] {
        for len in [[1, 37], [1, 600], [8, 130], [40, 40], [33, 257]] {
            cases.push(plain(len, dim));
        }
    }
    for len in [[1, 300], [5, 65], [70, 150]] {
        let sound = plain(len, [12, 20]);
        let options: [fn(&mut Case); 9] = [
            |case| case.causal = Some(Align::BottomRight),
            |case| case.window = [Some(33), Some(2)],
            |case| case.kv_len = Some(vec![case.len[1] / 2, case.len[1]]),
            |case| case.softcap = Some(1.5),
            |case| case.bias = Some([true; 4]),
            |case| case.mask = Some([true; 4]),
            |case| case.alibi = true,
            |case| case.sinks = true,
            // Scores up to 250, so that the largest weight is nearly all.
            |case| case.loud = 100.0,
        ];
        for change in options {
            let mut case = sound.clone();
            change(&mut case);
            cases.push(case);
        }
    }
    cases
}

#[test]
fn errors_are_no_larger_than_those_of_eager_pytorch_in_the_same_type() {
    let mut runs = 0;
    for dtype in [F16, BF16] {
        if dtype == F16 && !gpu().caps().f16 {
            println!("f16: 0 runs, this device has none");
            continue;
        }
        let (mut worst, mut sum, before) = (0.0f64, 0.0, runs);
        let cases = cases(dtype);
        for (seed, case) in cases.iter().enumerate() {
            let mut prepared = Prepared::new(gpu(), case, seed as u64);
            let narrow = gpu().narrowed(gpu().caps().without_subgroups());
            // Options change what is summed, not how lanes share it.
            let plain = seed < 20;
            for gpu in [gpu().clone(), narrow]
                .into_iter()
                .take(1 + usize::from(plain))
            {
                prepared = prepared.on(&gpu);
                for route in Route::ALL {
                    let answer = prepared.run(Some(route), None, None).unwrap();
                    let ratio = answer.beside_plain.expect("16-bit types");
                    assert!(
                        ratio <= 2.0,
                        "{ratio} times the errors: {route:?} of {case:?}"
                    );
                    (worst, sum) = (worst.max(ratio), sum + ratio);
                    runs += 1;
                }
            }
        }
        let mean = sum / (runs - before) as f64;
        println!(
            "{dtype:?}: errors {mean:.2} times those of eager PyTorch, at worst {worst:.2} times"
        );
    }
    println!("{runs} runs");
    assert_eq!(
        runs,
        if gpu().caps().f16 { 2 } else { 1 } * (20 * 6 + 27 * 3)
    );
}

/// Products in f16 on the route that has them: errors of each head's rows beside eager PyTorch's.
#[test]
fn products_in_f16_keep_to_the_same_errors() {
    if !gpu().caps().f16 {
        return println!("0 runs: this device has no f16");
    }
    let mut cases = cases(F16);
    let hard = |len, dim, loud| Case {
        loud,
        ..Case::new([1, 1], [4, 2], len, dim)
    };
    cases.extend([
        hard([40, 70], [12, 20], 1e4),
        hard([33, 257], [64, 64], 1e4),
        hard([40, 70], [12, 20], 1e-6),
        hard([33, 1500], [64, 64], 4.0),
        hard([40, 90], [576, 512], 4.0),
        hard([40, 90], [192, 128], 30.0),
    ]);
    for case in &mut cases {
        case.types = [F16; 4];
        case.f16_math = true;
    }
    let (mut runs, mut worst, mut sum) = (0, 0.0f64, 0.0);
    for caps in [
        gpu().caps().clone(),
        teams_in_subgroups(),
        gpu().caps().without_subgroups(),
    ] {
        let gpu = gpu().narrowed(caps);
        for (seed, case) in cases.iter().enumerate() {
            let prepared = Prepared::new(&gpu, case, seed as u64);
            let answer = prepared.run(None, None, None).unwrap();
            assert_eq!(answer.plan.route, Route::Prefill);
            let text = answer
                .plan
                .launches
                .last()
                .expect("a launch")
                .shader
                .expand(&templates());
            assert!(text.unwrap().contains("wg_v: array<vec4<f16>, 288>"));
            let ratio = answer.beside_plain.expect("16-bit types");
            assert!(ratio <= 2.0, "{ratio} times the errors: {case:?}");
            (worst, sum, runs) = (worst.max(ratio), sum + ratio, runs + 1);
        }
    }
    let mean = sum / f64::from(runs);
    println!(
        "{runs} runs: errors {mean:.2} times those of eager PyTorch, at worst {worst:.2} times"
    );
    assert_eq!(runs, 3 * 53);
}

#[test]
fn products_in_f16_are_refused_where_there_are_none() {
    let case = |types| Case {
        types,
        f16_math: true,
        ..Case::new([1, 1], [2, 2], [40, 40], [12, 20])
    };
    let say = |case: &Case, caps: Caps, route, splits, stage| {
        let prepared = Prepared::new(&gpu().narrowed(caps), case, 0);
        prepared.run(route, splits, stage).unwrap_err()
    };
    let full = || gpu().caps().clone();
    let halves = case([F16; 4]);
    let mut said = Vec::new();
    for place in 0..3 {
        for dtype in [F32, BF16] {
            let mut types = [F16; 4];
            types[place] = dtype;
            said.push(say(&case(types), full(), None, None, None));
        }
    }
    said.push(say(&halves, full().without_f16(), None, None, None));
    for route in [Route::ThreePass, Route::Decode] {
        said.push(say(&halves, full(), Some(route), None, None));
    }
    said.push(say(&halves, full(), None, None, Some(Stage::Softmax)));
    let invariant = Case {
        batch_invariant: true,
        ..halves
    };
    said.push(say(&invariant, full(), None, None, None));
    for said in &said {
        assert!(said.contains("f16_math"), "{said}");
    }
    assert_eq!(said.len(), 11);
}

#[test]
fn larger_errors_than_twice_the_plain_ones_are_objected_to() {
    let mut prepared = Prepared::new(gpu(), &cases(BF16)[2], 0);
    prepared.sharpen();
    let ratio = |answer: grid::Answer| answer.beside_plain.expect("16-bit types");
    // One rounding is allowed beside them; the ratio over all rows tells.
    assert!(ratio(prepared.run(None, None, None).unwrap()) > 1e3);
}
