//! Every option of the operator, alone and in pairs, on every route.

use grid::Function;

use super::*;

pub type Change = fn(&mut Case);

/// Options by name; each changes a sound case of two batch rows, four query heads and two KV heads.
pub const OPTIONS: [(&str, Change); 25] = [
    ("causal", |case| case.causal = Some(Align::BottomRight)),
    ("causal from the first key", |case| {
        case.causal = Some(Align::TopLeft)
    }),
    ("window to the left", |case| case.window[0] = Some(5)),
    ("window", |case| {
        case.window = [Some(33), if case.causal.is_some() { None } else { Some(2) }]
    }),
    ("no window at all", |case| case.window[0] = Some(0)),
    ("lengths", |case| {
        case.kv_len = case.ragged.is_none().then(|| lengths(4, case.len[1]))
    }),
    ("offsets", |case| case.q_offset = Some(vec![-3, 20])),
    ("prefix", |case| case.prefix = Some(vec![7, 0])),
    ("ragged", |case| {
        let [q, k] = case.len;
        case.kv_len = None;
        case.ragged = Some([vec![q - 2, 2], vec![3, k - 3]]);
    }),
    ("softcap", |case| case.softcap = Some(1.5)),
    ("bias", |case| case.bias = Some([true; 4])),
    ("bias of keys", |case| {
        case.bias = Some([true, false, false, true])
    }),
    ("bias of queries", |case| {
        case.bias = Some([false, true, true, false])
    }),
    ("bias in f16", |case| {
        case.bias = Some([false, true, true, true]);
        case.bias_type = F16;
    }),
    ("bias in bf16", |case| {
        case.bias = Some([true, true, false, true]);
        case.bias_type = BF16;
    }),
    ("mask", |case| case.mask = Some([true; 4])),
    ("mask of keys", |case| {
        case.mask = Some([true, false, false, true])
    }),
    ("ALiBi", |case| case.alibi = true),
    ("T5", |case| {
        case.t5 = Some(T5 {
            bidirectional: true,
            max_distance: 20,
        });
    }),
    ("T5 of decoders", |case| {
        case.t5 = Some(T5 {
            bidirectional: false,
            max_distance: 30,
        });
    }),
    ("sinks", |case| case.sinks = true),
    ("bf16", |case| case.types = [BF16; 4]),
    ("pages", |case| {
        let divides = |page: &u32| case.len[1].is_multiple_of(*page);
        case.page = [16, 10, 8, 3, 1].into_iter().find(divides);
    }),
    ("q8_0", |case| {
        case.dim = [32, 96];
        (case.types[1], case.types[2]) = (DType::Q8_0, DType::Q8_0);
    }),
    ("q4_0", |case| {
        case.dim = [96, 64];
        (case.types[1], case.types[2]) = (DType::Q4_0, DType::Q8_0);
    }),
];

fn plain(len: [u32; 2]) -> Case {
    Case::new([2, 2], [4, 2], len, [12, 20])
}

#[test]
fn every_option_equals_the_oracle() {
    let mut cases = Vec::new();
    for (_, change) in OPTIONS {
        for len in [[3, 37], [40, 40], [70, 150], [33, 9], [1, 600]] {
            let mut case = plain(len);
            if case.len[0] < 3 {
                // Two sequences of one query each would be more than there are.
                case.batch = [1, 1];
                case.heads = [8, 2];
            }
            change(&mut case);
            let one = |values: &mut Vec<u32>| values.truncate(1);
            if case.batch == [1, 1] {
                case.kv_len.iter_mut().for_each(one);
                case.prefix.iter_mut().for_each(one);
                case.q_offset
                    .iter_mut()
                    .for_each(|values| values.truncate(1));
                case.ragged = case.ragged.map(|_| [vec![1], vec![600]]);
            }
            cases.push(case);
        }
    }
    match gpu().caps().f16 {
        true => judge(gpu(), &cases, 5 * 5 * OPTIONS.len()),
        false => println!("0 runs: this device has no f16"),
    }
}

/// One of each kind of option: what meets in a pair.
const KINDS: [&str; 16] = [
    "causal", "window", "lengths", "offsets", "prefix", "ragged", "softcap", "bias", "mask",
    "ALiBi", "T5", "sinks", "bf16", "pages", "q8_0", "q4_0",
];

#[test]
fn options_in_pairs_equal_the_oracle() {
    let kinds: Vec<Change> = OPTIONS
        .into_iter()
        .filter(|(name, _)| KINDS.contains(name))
        .map(|(_, change)| change)
        .collect();
    let mut cases = Vec::new();
    for (ix, first) in kinds.iter().enumerate() {
        for second in &kinds[ix + 1..] {
            let mut case = plain([35, 70]);
            first(&mut case);
            second(&mut case);
            // The second of two of a kind takes the first one's place.
            if case.causal.is_some() {
                case.window[1] = None;
            }
            cases.push(case);
        }
    }
    judge(gpu(), &cases, 5 * 120);
}

#[test]
fn functions_of_the_callers_equal_the_options_they_replace() {
    let mut cases = Vec::new();
    for function in [Function::Alibi, Function::Window, Function::Documents] {
        for len in [[40, 40], [130, 130], [1, 1]] {
            for causal in [None, Some(Align::TopLeft)] {
                cases.push(Case {
                    function: Some(function),
                    causal,
                    align: Align::TopLeft,
                    sinks: causal.is_some(),
                    ..plain(len)
                });
            }
        }
    }
    judge(gpu(), &cases, 5 * 18);
}

#[test]
fn every_stage_of_the_scores_equals_the_oracle() {
    let mut runs = 0;
    for (seed, causal) in [None, Some(Align::BottomRight)].into_iter().enumerate() {
        for len in [[5, 37], [40, 70]] {
            let case = Case {
                causal,
                softcap: Some(2.0),
                alibi: true,
                // Nothing is poisoned that the stages before the mask must read.
                bias: Some([true; 4]),
                sinks: true,
                ..plain(len)
            };
            let prepared = Prepared::new(gpu(), &case, seed as u64);
            let mut outs = HashSet::new();
            for stage in [Stage::Raw, Stage::Softcap, Stage::Biased, Stage::Softmax] {
                outs.insert(prepared.run(None, None, Some(stage)).unwrap().out);
                runs += 1;
            }
            assert_eq!(outs.len(), 1, "the stage does not change the result");
        }
    }
    println!("{runs} runs");
    assert_eq!(runs, 16);
}

/// Options whose tensors the merging of the parts reads too, or does not.
#[test]
fn every_option_survives_the_splitting_of_the_keys() {
    if !gpu().caps().f16 {
        return println!("0 runs: this device has no f16");
    }
    let mut runs = 0;
    for caps in [
        gpu().caps().clone(),
        teams_in_subgroups(),
        gpu().caps().without_subgroups(),
    ] {
        let gpu = gpu().narrowed(caps);
        for (seed, (_, change)) in OPTIONS.into_iter().enumerate() {
            let mut case = plain([5, 192]);
            change(&mut case);
            let prepared = Prepared::new(&gpu, &case, seed as u64);
            let answer = prepared.run(Some(Route::Decode), Some(3), None).unwrap();
            assert_eq!(answer.plan.splits, 3);
            runs += 1;
        }
    }
    assert_eq!(runs, 3 * OPTIONS.len());
}

/// What the full powers of a software device do not choose.
#[test]
fn every_option_equals_the_oracle_in_the_tiles_of_workgroup_memory() {
    if !gpu().caps().f16 {
        return println!("0 runs: this device has no f16");
    }
    let mut runs = 0;
    for caps in [teams_in_subgroups(), gpu().caps().without_subgroups()] {
        let gpu = gpu().narrowed(caps);
        for (seed, (_, change)) in OPTIONS.into_iter().enumerate() {
            let mut case = plain([40, 70]);
            change(&mut case);
            let prepared = Prepared::new(&gpu, &case, seed as u64);
            let answer = prepared.run(Some(Route::Prefill), None, None).unwrap();
            let mut kernels = answer.plan.launches.iter().map(|one| one.shader.kernel);
            assert!(kernels.any(|kernel| kernel == "prefill"));
            runs += 1;
        }
    }
    assert_eq!(runs, 2 * OPTIONS.len());
}

/// What lies between a prefix and a window is jumped over in whole steps of 32 to 256 keys: gaps that begin and end
/// at, before and behind their edges, shorter and longer than several.
#[test]
fn gaps_between_a_prefix_and_a_window_equal_the_oracle() {
    let mut cases = Vec::new();
    for (len, left) in [
        (1, 63),
        (1, 64),
        (1, 255),
        (5, 0),
        (5, 60),
        (40, 31),
        (40, 200),
    ] {
        for prefix in [1, 31, 32, 33, 64, 256, 300] {
            cases.push(Case {
                causal: Some(Align::BottomRight),
                window: [Some(left), None],
                prefix: Some(vec![prefix, 0]),
                kv_len: Some(vec![640, 577]),
                ..plain([len, 640])
            });
        }
    }
    judge(gpu(), &cases, 5 * 49);
    let mut runs = 0;
    for caps in [
        gpu().caps().clone(),
        teams_in_subgroups(),
        gpu().caps().without_subgroups(),
    ] {
        let gpu = gpu().narrowed(caps);
        for (seed, case) in cases.iter().enumerate() {
            let mut prepared = Prepared::new(&gpu, case, seed as u64);
            let prefill = prepared.run(Some(Route::Prefill), None, None).unwrap();
            assert_eq!(prefill.plan.route, Route::Prefill);
            let split = prepared.run(Some(Route::Decode), Some(5), None).unwrap();
            assert_eq!(split.plan.splits, 5);
            prepared.case.batch_invariant = true;
            let invariant = prepared.run(None, None, None).unwrap();
            assert_eq!(invariant.plan.route, Route::Decode);
            runs += 3;
        }
    }
    assert_eq!(runs, 3 * 3 * 49);
}

/// The last query of three, and the same query alone: chunks of a prompt may be cut anywhere.
#[test]
fn a_batch_invariant_row_does_not_change_with_its_chunk() {
    for caps in [
        gpu().caps().clone(),
        teams_in_subgroups(),
        gpu().caps().without_subgroups(),
    ] {
        for (prefix, route) in [
            (None, None),
            (Some(1), None),
            (Some(300), None),
            (None, Some(Route::ThreePass)),
            (Some(300), Some(Route::ThreePass)),
        ] {
            let [chunk, alone] = chunk_and_alone(&gpu().narrowed(caps.clone()), prefix, route);
            assert_eq!(chunk, alone, "prefix {prefix:?} {route:?}");
        }
    }
}

/// Its tiles are cut for all the rows of a block at once.
#[test]
fn a_batch_invariant_prefill_is_refused() {
    let tensor = |l| gpu().empty("tensor", F32, &[1, 2, l, 16]).unwrap();
    let [q, k, v, out] = [64, 256, 256, 64].map(tensor);
    let [q, k, v, out] = [&q, &k, &v, &out].map(|tensor| View::bhld(tensor).unwrap());
    let options = Options {
        batch_invariant: true,
        route: Some(Route::Prefill),
        ..Options::default()
    };
    let tensors = Tensors::new(q, k, v, out);
    let refused = record(&mut Recorder::new(gpu()), &tensors, &options).unwrap_err();
    let said = refused.to_string();
    assert!(said.contains("route") && said.contains("Prefill"), "{said}");
}

/// The bits of the last query's row after three queries, and after itself alone.
fn chunk_and_alone(gpu: &Gpu, prefix: Option<u32>, route: Option<Route>) -> [Vec<u32>; 2] {
    let (d, k_len) = (16, 1100);
    let mut random = grid::Random::new(9);
    let mut noise = |n: u32| -> Vec<f32> { (0..n).map(|_| random.float() as f32).collect() };
    let queries = noise(3 * d);
    let kv = [noise(k_len * d), noise(k_len * d)].map(|values| {
        gpu.upload_floats("kv", F32, &[1, 1, k_len, d], &values)
            .unwrap()
    });
    let prefix = prefix.map(|n| gpu.upload_u32("prefix", &[1], &[n]).unwrap());
    let run = |queries: &[f32]| -> Vec<u32> {
        let shape = [1, 1, queries.len() as u32 / d, d];
        let q = gpu.upload_floats("q", F32, &shape, queries).unwrap();
        let out = gpu.empty("out", F32, &shape).unwrap();
        let tensors = Tensors {
            prefix_len: prefix.as_ref(),
            ..Tensors::new(
                View::bhld(&q).unwrap(),
                View::bhld(&kv[0]).unwrap(),
                View::bhld(&kv[1]).unwrap(),
                View::bhld(&out).unwrap(),
            )
        };
        let options = Options {
            causal: true,
            // The window of the first query begins in another step of the loop than the last one's.
            window: [Some(k_len - 1 - 640), None],
            batch_invariant: true,
            route,
            ..Options::default()
        };
        let mut recorder = Recorder::new(gpu);
        record(&mut recorder, &tensors, &options).unwrap();
        gpu.run(&recorder.finish().unwrap()).unwrap();
        let all = gpu.read_floats(&out).unwrap();
        all[all.len() - d as usize..]
            .iter()
            .map(|x| x.to_bits())
            .collect()
    };
    [run(&queries), run(&queries[2 * d as usize..])]
}

/// The same row with other neighbours: queries and keys of one sequence, bit for bit, in ragged batches.
#[test]
fn a_batch_invariant_row_does_not_change_with_its_neighbours() {
    let (heads, kv_heads, d) = (4u32, 2u32, 16u32);
    let mut random = grid::Random::new(5);
    let mut noise = |n: u32| -> Vec<f32> { (0..n).map(|_| random.float() as f32).collect() };
    // Keys in two parts, and in one that others' lengths put beside empty ones; with a sink above every score.
    for (keys, sinks) in [(1100u32, false), (300, false), (300, true)] {
        // Head-major rows of the sequence that is watched: 3 queries.
        let own = [(heads, 3), (kv_heads, keys), (kv_heads, keys)].map(|(h, l)| noise(h * l * d));
        let sink = gpu()
            .upload_floats("sinks", F32, &[heads], &[5.0; 4])
            .unwrap();
        let mut run = |before: [u32; 2], after: [u32; 2]| -> Vec<u32> {
            let mut build = |own: &[f32], h: u32, l: u32, ix: usize| {
                let all = before[ix] + l + after[ix];
                let mut cells = noise(h * all * d);
                for head in 0..h {
                    let to = ((head * all + before[ix]) * d) as usize;
                    let from = (head * l * d) as usize;
                    let n = (l * d) as usize;
                    cells[to..to + n].copy_from_slice(&own[from..from + n]);
                }
                gpu()
                    .upload_floats("ragged", F32, &[1, h, all, d], &cells)
                    .unwrap()
            };
            let q = build(&own[0], heads, 3, 0);
            let k = build(&own[1], kv_heads, keys, 1);
            let v = build(&own[2], kv_heads, keys, 1);
            let cu = |n: u32, ix: usize| {
                let ends = [0, before[ix], before[ix] + n, before[ix] + n + after[ix]];
                gpu().upload_u32("cu", &[4], &ends).unwrap()
            };
            let (cu_q, cu_k) = (cu(3, 0), cu(keys, 1));
            let out = gpu().empty("out", F32, q.shape()).unwrap();
            let tensors = Tensors {
                cu_q: Some(&cu_q),
                cu_k: Some(&cu_k),
                sinks: sinks.then_some(&sink),
                ..Tensors::new(
                    View::bhld(&q).unwrap(),
                    View::bhld(&k).unwrap(),
                    View::bhld(&v).unwrap(),
                    View::bhld(&out).unwrap(),
                )
            };
            let options = Options {
                causal: true,
                window: [Some(700), None],
                batch_invariant: true,
                ..Options::default()
            };
            let mut recorder = Recorder::new(gpu());
            record(&mut recorder, &tensors, &options).unwrap();
            gpu().run(&recorder.finish().unwrap()).unwrap();
            let all = gpu().read_floats(&out).unwrap();
            let len = (before[0] + 3 + after[0]) as usize;
            let row = |head: usize| {
                &all[(head * len + before[0] as usize) * d as usize..][..3 * d as usize]
            };
            (0..heads as usize)
                .flat_map(row)
                .map(|x| x.to_bits())
                .collect()
        };
        let alone = run([0, 0], [0, 0]);
        assert_eq!(alone.len(), 4 * 3 * 16);
        for (before, after) in [
            ([1, 5], [0, 0]),
            ([7, 900], [2, 40]),
            ([0, 0], [50, 3000]),
            ([3, 0], [1, 1]),
        ] {
            assert_eq!(
                run(before, after),
                alone,
                "{before:?} {after:?} {keys} {sinks}"
            );
        }
    }
}
