//! Parts of problems: merged results, bindings by slice, launches of bounded work, long keys.

use proptest::prelude::*;
use qkv::attention::{Partial, SharedKeys, merge, record_cascade};

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
fn merging_into_f16_is_refused_where_there_is_none() {
    let plain = gpu().narrowed(gpu().caps().without_f16());
    let make = |dtype, shape: &[u32]| gpu().empty("tensor", dtype, shape).unwrap();
    let (out, lse) = (make(F32, &[1, 1, 3, 4]), make(F32, &[1, 1, 3]));
    let into = make(F16, &[1, 1, 3, 4]);
    let part = Partial {
        out: &out,
        lse: &lse,
    };
    let mut recorder = Recorder::new(&plain);
    let result = merge(&mut recorder, [part; 2], &View::bhld(&into).unwrap(), None);
    assert_eq!(refused(result), "the storage type of into");
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
    // A mask of each head's own is cut along the KV heads, on the prefill route too.
    let case = Case {
        mask: Some([true; 4]),
        ..Case::new([1, 1], [4, 2], [64, 64], [4, 4])
    };
    let narrow = gpu().narrowed(Caps {
        max_binding: 10_000,
        storage_align: 256,
        ..full.clone()
    });
    let prepared = Prepared::new(gpu(), &case, 2).on(&narrow);
    let answer = prepared.run(Some(Route::Prefill), None, None).unwrap();
    let kernels = answer.plan.launches.iter().map(|one| one.shader.kernel);
    assert_eq!(kernels.filter(|&kernel| kernel == "block_map").count(), 2);
}

/// Rows behind the last sequence keep what they held, and those behind the last group have their own keys alone.
#[test]
fn a_cascade_writes_the_rows_of_its_sequences_alone() {
    let (d, page) = (16, 4);
    let values: Vec<f32> = (0..6 * page * d).map(|n| (n % 7) as f32 / 7.0).collect();
    let upload = |shape: &[u32]| {
        let n = shape.iter().product::<u32>() as usize;
        gpu()
            .upload_floats("input", F32, shape, &values[..n])
            .unwrap()
    };
    let (q, pool) = (upload(&[1, 1, 4, d]), upload(&[6, 1, page, d]));
    let integers = |values: &[u32]| {
        gpu()
            .upload_u32("integers", &[values.len() as u32], values)
            .unwrap()
    };
    let pages = |values: &[u32]| {
        gpu()
            .upload_u32("pages", &[values.len() as u32, 1], values)
            .unwrap()
    };
    // Rows 0 and 1 are of sequences, the first alone of a group.
    let (cu_q, own, lengths) = (integers(&[0, 1, 2]), pages(&[1, 2]), integers(&[3, 4]));
    let (of_group, shared, shared_len) = (integers(&[0, 1]), pages(&[0]), integers(&[4]));
    let run = |cascade: bool| -> [Vec<f32>; 2] {
        let held = vec![7.5; 4 * d as usize];
        let out = gpu()
            .upload_floats("out", F32, &[1, 1, 4, d], &held)
            .unwrap();
        let lse = gpu()
            .upload_floats("lse", F32, &[1, 1, 4], &held[..4])
            .unwrap();
        let view = |tensor| View::bhld(tensor).unwrap();
        let tensors = Tensors {
            pages: Some(&own),
            kv_len: Some(&lengths),
            cu_q: Some(&cu_q),
            lse: Some(&lse),
            ..Tensors::new(view(&q), view(&pool), view(&pool), view(&out))
        };
        let keys = SharedKeys {
            pages: &shared,
            kv_len: &shared_len,
            cu_q: &of_group,
        };
        let mut recorder = Recorder::new(gpu());
        let options = Options::default();
        match cascade {
            true => drop(record_cascade(&mut recorder, &tensors, &keys, &options).unwrap()),
            false => drop(record(&mut recorder, &tensors, &options).unwrap()),
        }
        gpu().run(&recorder.finish().unwrap()).unwrap();
        [&out, &lse].map(|tensor| gpu().read_floats(tensor).unwrap())
    };
    let ([out, lse], [own, own_lse]) = (run(true), run(false));
    let row = |n: usize| n * d as usize..(n + 1) * d as usize;
    assert_eq!((&out[row(1)], lse[1]), (&own[row(1)], own_lse[1]));
    assert_ne!((&out[row(0)], lse[0]), (&own[row(0)], own_lse[0]));
    assert!(
        out[row(2).start..]
            .iter()
            .chain(&lse[2..])
            .all(|&x| x == 7.5)
    );
}

#[test]
fn no_query_at_all_records_nothing_wrong() {
    let make = |shape: &[u32]| gpu().empty("tensor", F32, shape).unwrap();
    let [q, out] = [(); 2].map(|()| make(&[1, 1, 0, 16]));
    let k = make(&[1, 1, 4096, 16]);
    let cu_q = gpu().upload_u32("cu_q", &[3], &[0; 3]).unwrap();
    let cu_k = gpu().upload_u32("cu_k", &[3], &[0, 2048, 4096]).unwrap();
    for route in Route::ALL.map(Some).into_iter().chain([None]) {
        let view = |tensor| View::bhld(tensor).unwrap();
        let tensors = Tensors {
            cu_q: Some(&cu_q),
            cu_k: Some(&cu_k),
            ..Tensors::new(view(&q), view(&k), view(&k), view(&out))
        };
        let options = Options {
            route,
            ..Options::default()
        };
        let mut recorder = Recorder::new(gpu());
        record(&mut recorder, &tensors, &options).unwrap();
        gpu().run(&recorder.finish().unwrap()).unwrap();
    }
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

/// As many keys as a driver that cuts long loops is given at once, each tile's scores far above the last one's and
/// one of its keys masked, so that no tile can be spared a turn.
#[test]
fn the_longest_loops_of_prefill_reach_the_last_key() {
    if !gpu().caps().software {
        return println!("only processors have such loops");
    }
    let options = Options {
        route: Some(Route::Prefill),
        scale: Some(1.0),
        mask_mod: Some("fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool { return k % 32u != 5u || q != 3u; }".into()),
        ..Options::default()
    };
    for caps in [gpu().caps().clone(), gpu().caps().without_subgroups()] {
        let fits = |len| plans::planned([1, 1, 1], [24, len], [4, 4], &options, &caps).is_ok();
        let (mut most, mut many) = (1_000, 200_000);
        assert!(fits(most) && !fits(many));
        while many - most > 1 {
            let len = most.midpoint(many);
            *if fits(len) { &mut most } else { &mut many } = len;
        }
        let narrow = gpu().narrowed(caps);
        let keys: Vec<f32> = (0..most * 4).map(|n| (n / 128 * 4) as f32).collect();
        let values: Vec<f32> = (0..most * 4).map(|n| (n / 128) as f32).collect();
        let floats =
            |shape: [u32; 4], x: &[f32]| narrow.upload_floats("tensor", F32, &shape, x).unwrap();
        let q = floats([1, 1, 24, 4], &[1.0; 96]);
        let [k, v] = [keys, values].map(|x| floats([1, 1, most, 4], &x));
        let out = narrow.empty("out", F32, &[1, 1, 24, 4]).unwrap();
        let view = |tensor| View::bhld(tensor).unwrap();
        let tensors = Tensors::new(view(&q), view(&k), view(&v), view(&out));
        let mut recorder = Recorder::new(&narrow);
        record(&mut recorder, &tensors, &options).unwrap();
        narrow.run(&recorder.finish().unwrap()).unwrap();
        let last = ((most - 1) / 32) as f32;
        println!("{most} keys");
        for x in narrow.read_floats(&out).unwrap() {
            assert!((x - last).abs() < 1e-3, "{x} for {last} of {most} keys");
        }
    }
}

#[test]
fn a_nan_reaches_the_rows_that_see_it_and_no_other() {
    // Key or value 20 is NaN: queries 0 .. 19 of a causal problem do not see it, the others do.
    let shape = [1, 2, 40, 16];
    let mut values = vec![0.25; 2 * 40 * 16];
    let sound = gpu().upload_floats("q", F32, &shape, &values).unwrap();
    values[20 * 16..21 * 16].fill(f32::NAN);
    let with_nan = gpu().upload_floats("v", F32, &shape, &values).unwrap();
    for (route, softcap) in Route::ALL
        .into_iter()
        .flat_map(|route| [(route, None), (route, Some(3.0))])
    {
        for in_keys in [false, true] {
            let out = gpu().empty("out", F32, &shape).unwrap();
            let lse = gpu().empty("lse", F32, &shape[..3]).unwrap();
            let view = |tensor| View::bhld(tensor).unwrap();
            let [k, v] = match in_keys {
                true => [&with_nan, &sound],
                false => [&sound, &with_nan],
            };
            let tensors = Tensors {
                lse: Some(&lse),
                ..Tensors::new(view(&sound), view(k), view(v), view(&out))
            };
            let options = Options {
                causal: true,
                softcap,
                route: Some(route),
                ..Options::default()
            };
            let mut recorder = Recorder::new(gpu());
            record(&mut recorder, &tensors, &options).unwrap();
            gpu().run(&recorder.finish().unwrap()).unwrap();
            let got = gpu().read_floats(&out).unwrap();
            let lse = gpu().read_floats(&lse).unwrap();
            for (row, (values, lse)) in got.chunks(16).zip(lse).enumerate() {
                let seen = (20..40).contains(&row);
                assert!(
                    values.iter().all(|x| x.is_nan() == seen) && lse.is_nan() == (seen && in_keys),
                    "{route:?} {softcap:?} {in_keys} row {row}: {values:?}, LSE {lse}"
                );
            }
        }
    }
}

/// A part that is NaN makes the whole so.
#[test]
fn a_nan_is_not_lost_in_merging() {
    let upload = |shape: &[u32], x| gpu().upload_floats("part", F32, shape, &[x; 4]).unwrap();
    let (sound, lse) = (
        upload(&[1, 1, 1, 4], 0.5),
        gpu().upload_floats("lse", F32, &[1, 1, 1], &[0.0]).unwrap(),
    );
    let (nan, nan_lse) = (
        upload(&[1, 1, 1, 4], f32::NAN),
        gpu()
            .upload_floats("lse", F32, &[1, 1, 1], &[f32::NAN])
            .unwrap(),
    );
    // Of a row that saw no key.
    let (empty, no_lse) = (
        upload(&[1, 1, 1, 4], 0.0),
        gpu()
            .upload_floats("lse", F32, &[1, 1, 1], &[f32::NEG_INFINITY])
            .unwrap(),
    );
    for parts in [
        [(&sound, &lse), (&nan, &nan_lse)],
        [(&nan, &nan_lse), (&sound, &lse)],
        [(&empty, &no_lse), (&nan, &nan_lse)],
        [(&nan, &nan_lse), (&empty, &no_lse)],
    ] {
        let result = gpu().empty("out", F32, &[1, 1, 1, 4]).unwrap();
        let into = View::bhld(&result).unwrap();
        let whole = gpu().empty("lse", F32, &[1, 1, 1]).unwrap();
        let mut recorder = Recorder::new(gpu());
        let parts = parts.map(|(out, lse)| Partial { out, lse });
        merge(&mut recorder, parts, &into, Some(&whole)).unwrap();
        gpu().run(&recorder.finish().unwrap()).unwrap();
        for tensor in [&result, &whole] {
            let got = gpu().read_floats(tensor).unwrap();
            assert!(got.iter().all(|x| x.is_nan()), "{got:?}");
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
        // What a kernel calls, of WGSL's own and of those that its templates make.
        (
            score("return s;") + "\nfn exp2(x: f32) -> f32 { return x; }",
            "exp2",
        ),
        (
            score("return s;") + "\nfn load_q(x: f32) -> f32 { return x; }",
            "load_q",
        ),
        (
            score("return s;")
                + "\n/*\n@group(0) @binding(1) var<storage, read> x: array<f32>;\n*/",
            "@group",
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
    for name in ["", "fn", "kv_len", "a b", "score", "max", "store_o"] {
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
