//! Parts of problems: merged results, bindings by slice, launches of bounded work, long keys.

use proptest::prelude::*;
use qkv::attention::{Partial, merge};

use super::problems::refused;
use super::*;

/// Attention over some keys of one problem: out and LSE on the device.
fn partial(tensors: &[Tensor; 3], keys: [u32; 2]) -> [Tensor; 2] {
    let [q, k, v] = tensors;
    let &[b, h, q_len, _] = q.shape() else {
        unreachable!()
    };
    fn some(tensor: &Tensor, keys: [u32; 2]) -> View<'_> {
        let [b, h, l, d] = View::bhld(tensor).unwrap().extents();
        let extents = [b, h, keys[1] - keys[0], d];
        View::new(tensor, extents, keys[0] * d, [h * l * d, l * d, d]).unwrap()
    }
    let dv = v.shape()[3];
    let out = gpu().empty("out", F32, &[b, h, q_len, dv]).unwrap();
    let lse = gpu().empty("lse", F32, &[b, h, q_len]).unwrap();
    let tensors = Tensors {
        lse: Some(&lse),
        ..Tensors::new(
            View::bhld(q).unwrap(),
            some(k, keys),
            some(v, keys),
            View::bhld(&out).unwrap(),
        )
    };
    let mut recorder = Recorder::new(gpu());
    record(&mut recorder, &tensors, &Options::default()).unwrap();
    gpu().run(&recorder.finish().unwrap()).unwrap();
    [out, lse]
}

fn merged(a: &[Tensor; 2], b: &[Tensor; 2]) -> [Tensor; 2] {
    let out = gpu().empty("out", F32, a[0].shape()).unwrap();
    let lse = gpu().empty("lse", F32, a[1].shape()).unwrap();
    let mut recorder = Recorder::new(gpu());
    let parts = [a, b].map(|[out, lse]| Partial { out, lse });
    merge(&mut recorder, parts, &View::bhld(&out).unwrap(), Some(&lse)).unwrap();
    gpu().run(&recorder.finish().unwrap()).unwrap();
    [out, lse]
}

#[test]
fn partial_results_merge_into_the_whole_in_any_order() {
    let mut random = grid::Random::new(3);
    let mut make = |shape: [u32; 4]| {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| 3.0 * random.float() as f32)
            .collect();
        gpu().upload_floats("input", F32, &shape, &values).unwrap()
    };
    let tensors = [
        make([2, 4, 5, 12]),
        make([2, 2, 90, 12]),
        make([2, 2, 90, 20]),
    ];
    let read = |parts: &[Tensor; 2]| -> (Vec<f64>, Vec<f64>) {
        let wide = |tensor| {
            gpu()
                .read_floats(tensor)
                .unwrap()
                .into_iter()
                .map(f64::from)
                .collect()
        };
        (wide(&parts[0]), wide(&parts[1]))
    };
    let whole = read(&partial(&tensors, [0, 90]));
    let parts = [[0, 7], [7, 7], [7, 64], [64, 90]].map(|keys| partial(&tensors, keys));
    // Keys 7 .. 7 are none: zeros and -inf.
    let (empty, lse) = read(&parts[1]);
    assert!(empty.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f64::NEG_INFINITY));
    assert_eq!(read(&merged(&parts[1], &parts[1])), (empty, lse));
    let left = merged(&merged(&merged(&parts[0], &parts[1]), &parts[2]), &parts[3]);
    let right = merged(&parts[0], &merged(&parts[1], &merged(&parts[2], &parts[3])));
    for got in [left, right] {
        let (out, lse) = read(&got);
        let narrow = |values: &[f64]| values.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let tolerance = compare::tolerance("f32", 90);
        compare::compare_rows("merged", &narrow(&out), &whole.0, 20, tolerance).unwrap();
        compare::compare_rows("LSE", &narrow(&lse), &whole.1, 1, tolerance).unwrap();
    }
    // Results that do not belong together, and one in its own input.
    let mut recorder = Recorder::new(gpu());
    let [out, lse] = &parts[0];
    let own = Partial { out, lse };
    let into = View::bhld(out).unwrap();
    assert_eq!(refused(merge(&mut recorder, [own; 2], &into, None)), "into");
    let fresh = gpu().empty("fresh", F32, &[2, 4, 5, 20]).unwrap();
    let fresh = View::bhld(&fresh).unwrap();
    assert_eq!(
        refused(merge(&mut recorder, [own; 2], &fresh, Some(lse))),
        "lse"
    );
    let narrow = gpu().empty("narrow", F32, &[2, 4, 5, 8]).unwrap();
    let other = Partial { out: &narrow, lse };
    assert_eq!(
        refused(merge(&mut recorder, [own, other], &fresh, None)),
        "the second part"
    );
}

#[test]
fn problems_beyond_a_binding_are_cut_into_parts() {
    let full = gpu().caps();
    let case = Case {
        causal: Some(Align::BottomRight),
        kv_len: Some(vec![70, 33, 64]),
        bias: Some([true, true, false, true]),
        mask: Some([true, true, false, true]),
        sinks: true,
        ..Case::new([6, 3], [4, 2], [65, 70], [12, 20])
    };
    let mut parts = Vec::new();
    // Two batch rows of scores have 145,600 bytes, those of one KV head alone lie within 109,200.
    for bytes in [1 << 20, 180_000, 120_000] {
        let narrow = gpu().narrowed(Caps {
            max_binding: bytes,
            storage_align: 256,
            ..full.clone()
        });
        let prepared = Prepared::new(gpu(), &case, 1).on(&narrow);
        for route in Route::ALL {
            let answer = prepared.run(Some(route), None, None).unwrap();
            parts.push(answer.plan.launches.len());
        }
        prepared.run(None, None, Some(Stage::Biased)).unwrap();
    }
    assert_eq!(parts, [3, 2, 1, 9, 2, 1, 18, 6, 3]);
}

#[test]
fn long_work_is_cut_into_launches() {
    let mut caps = plans::caps();
    caps.max_binding = 1 << 31;
    for (route, launches) in [(Route::Prefill, 8), (Route::Decode, 8)] {
        let options = Options {
            route: Some(route),
            ..Options::default()
        };
        let plan =
            plans::planned([1, 1, 1], [1 << 16, 1 << 16], [64, 64], &options, &caps).unwrap();
        assert_eq!(plan.launches.len(), launches, "{route:?}");
        assert!(plan.launches.iter().all(|launch| launch.groups > 0));
    }
}

#[test]
fn a_hundred_thousand_keys_equal_the_oracle() {
    let case = Case {
        window: [Some(100_000), None],
        sinks: true,
        ..Case::new([1, 1], [2, 1], [1, 131_072], [12, 20])
    };
    let (mut runs, mut refused) = (0, 0);
    for caps in [gpu().caps().clone(), gpu().caps().without_subgroups()] {
        let prepared = Prepared::new(&gpu().narrowed(caps), &case, 1);
        for (route, splits) in [
            (None, None),
            (Some(Route::ThreePass), None),
            (Some(Route::Prefill), None),
            (Some(Route::Decode), None),
            (Some(Route::Decode), Some(1)),
        ] {
            // A software driver that cuts long loops takes fewer keys at once, and says so.
            match prepared.run(route, splits, None) {
                Ok(_) => runs += 1,
                Err(said) if said.contains("this driver cuts longer loops") => refused += 1,
                Err(said) => panic!("{said}"),
            }
        }
    }
    println!("{runs} runs, {refused} refused");
    assert_eq!(
        (runs, refused),
        if gpu().caps().software {
            (7, 3)
        } else {
            (10, 0)
        }
    );
}

#[test]
fn a_nan_reaches_the_rows_that_see_it_and_no_other() {
    // Value 20 is NaN: queries 0 .. 19 of a causal problem do not see it, the others do.
    let shape = [1, 2, 40, 16];
    let mut values = vec![0.25; 2 * 40 * 16];
    let q = gpu().upload_floats("q", F32, &shape, &values).unwrap();
    values[20 * 16..21 * 16].fill(f32::NAN);
    let v = gpu().upload_floats("v", F32, &shape, &values).unwrap();
    for route in Route::ALL {
        let out = gpu().empty("out", F32, &shape).unwrap();
        let tensors = Tensors::new(
            View::bhld(&q).unwrap(),
            View::bhld(&q).unwrap(),
            View::bhld(&v).unwrap(),
            View::bhld(&out).unwrap(),
        );
        let options = Options {
            causal: true,
            route: Some(route),
            ..Options::default()
        };
        let mut recorder = Recorder::new(gpu());
        record(&mut recorder, &tensors, &options).unwrap();
        gpu().run(&recorder.finish().unwrap()).unwrap();
        let got = gpu().read_floats(&out).unwrap();
        for (row, values) in got.chunks(16).enumerate() {
            let seen = (20..40).contains(&row);
            assert!(
                values.iter().all(|x| x.is_nan() == seen),
                "{route:?} row {row}: {values:?}"
            );
        }
    }
}

#[test]
fn functions_that_do_not_fit_are_refused_with_the_callers_line() {
    let parts = problems::Parts::new();
    let table = gpu().empty("table", F32, &[4]).unwrap();
    let score = |body: &str| {
        format!("fn score_mod(s: f32, b: u32, h: u32, q: u32, k: u32) -> f32 {{\n{body}\n}}")
    };
    for (text, word) in [
        ("fn score_mod(s: f32, 1".into(), "line 1"),
        (score("return s + missing;"), "line 2"),
        (score("return k;"), "score_mod"),
        (score("workgroupBarrier(); return s;"), "barrier"),
        (
            score("return s;") + "\nfn score(x: f32) -> f32 { return x; }",
            "score",
        ),
        (score("return s;") + "\nvar<private> mine: f32;", "variable"),
        (
            "fn score_mod(s: f32) -> f32 { return s; }".into(),
            "fn score_mod(score: f32",
        ),
        ("enable f16;\n".to_string() + &score("return s;"), "line 1"),
        (
            score("return s;") + "\n@compute @workgroup_size(1) fn go() {}",
            "entry point",
        ),
    ] {
        for extra in [false, true] {
            let mut tensors = parts.tensors();
            if extra {
                tensors.extra = vec![("slopes", &table)];
            }
            let options = Options {
                score_mod: Some(text.as_str().into()),
                ..Options::default()
            };
            let said = Problem::new(&tensors, &options).unwrap_err().to_string();
            assert!(said.contains(word), "{text}: {said}");
        }
    }
    for name in ["", "fn", "kv_len", "a b", "score"] {
        let mut tensors = parts.tensors();
        tensors.extra = vec![(name, &table)];
        let options = Options {
            score_mod: Some(score("return s;").as_str().into()),
            ..Options::default()
        };
        assert_eq!(
            refused(Problem::new(&tensors, &options)),
            "an extra buffer's name"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is asked: a result, or a refusal that names the argument; no panic, no device error.
    #[test]
    fn any_options_give_a_result_or_a_refusal(
        sizes in (0u32..3, 0u32..5, 0u32..4, 0u32..40, 0u32..70, 0u32..20, 0u32..20),
        scale in proptest::option::of(-2f32..2.0),
        softcap in proptest::option::of(-1f32..4.0),
        causal in any::<bool>(),
        window in (proptest::option::of(0u32..40), proptest::option::of(0u32..40)),
        route in proptest::option::of(0usize..3),
        splits in proptest::option::of(0u32..4),
        invariant in any::<bool>(),
        stage in proptest::option::of(0usize..4),
    ) {
        let (b, h, hk, q_len, k_len, d, dv) = sizes;
        let make = |shape: [u32; 4]| gpu().empty("tensor", F32, &shape).unwrap();
        let (q, k) = (make([b, h, q_len, d]), make([b, hk, k_len, d]));
        let (v, out) = (make([b, hk, k_len, dv]), make([b, h, q_len, dv]));
        let weights = make([b, h, q_len, k_len]);
        let tensors = Tensors {
            weights: stage.map(|_| &weights),
            ..Tensors::new(
                View::bhld(&q).unwrap(),
                View::bhld(&k).unwrap(),
                View::bhld(&v).unwrap(),
                View::bhld(&out).unwrap(),
            )
        };
        let stages = [Stage::Raw, Stage::Softcap, Stage::Biased, Stage::Softmax];
        let options = Options {
            scale,
            softcap,
            causal,
            window: [window.0, window.1],
            route: route.map(|ix| Route::ALL[ix]),
            splits,
            batch_invariant: invariant,
            stage: stage.map_or(Stage::Softmax, |ix| stages[ix]),
            ..Options::default()
        };
        let mut recorder = Recorder::new(gpu());
        match record(&mut recorder, &tensors, &options) {
            Ok(_) => gpu().run(&recorder.finish().unwrap()).unwrap(),
            Err(error) => prop_assert!(matches!(error, Error::Refused { .. }), "{}", error),
        }
    }
}
