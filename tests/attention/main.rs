//! Attention on every route against the oracle, row by row, and what it refuses.
//!
//! A case runs on every route, by the plan's own choice, and with its weights: five runs. Each test
//! prints and asserts how many runs there were.

mod buffers;
#[path = "../support/compare.rs"]
mod compare;
mod coop;
#[path = "../support/device.rs"]
mod device;
#[path = "../support/grid/mod.rs"]
mod grid;
mod limits;
mod options;
mod packed;
mod plans;
mod problems;
mod sixteen;

use std::collections::HashSet;

use device::gpu;
use grid::{Case, Place, Prepared};
use qkv::Error;
use qkv::attention::{
    Align, MAX_HEAD_DIM, Options, Plan, Problem, Route, Stage, T5, Tensors, View, plan, record,
};
use qkv::gpu::{Caps, DType, Gpu, Recorder, Tensor};

const F16: DType = DType::F16;
const BF16: DType = DType::BF16;
const F32: DType = DType::F32;

/// The masks that are ranges: none, causal in both alignments; each with and without key lengths.
const CAUSAL: [Option<Align>; 3] = [None, Some(Align::BottomRight), Some(Align::TopLeft)];

/// Runs every case on every route and by the plan's choice, and asserts the number of runs.
#[track_caller]
fn judge(gpu: &Gpu, cases: &[Case], wanted_runs: usize) {
    let mut runs = 0;
    let mut shaders = HashSet::new();
    for (seed, case) in cases.iter().enumerate() {
        let prepared = Prepared::new(gpu, case, seed as u64);
        let mut forced = Vec::new();
        for route in Route::ALL {
            let answer = prepared.run(Some(route), None, None).unwrap();
            assert_eq!(answer.plan.route, route);
            forced.push(answer);
        }
        // The same plan gives the same bits; a mix of two routes none of which could be forced is one of its own.
        let chosen = prepared.run(None, None, None).unwrap();
        if chosen.plan.short.is_some() {
            assert_eq!(prepared.run(None, None, None).unwrap(), chosen, "{case:?}");
        } else {
            let same = forced.iter().find(|answer| answer.plan == chosen.plan);
            assert_eq!(same.expect("a forced route").out, chosen.out, "{case:?}");
        }
        let weighed = prepared.run(None, None, Some(Stage::Softmax)).unwrap();
        assert_eq!(weighed.plan.route, Route::ThreePass);
        assert_eq!(forced[0].out, weighed.out, "{case:?}");
        runs += forced.len() + 2;
        for answer in forced.iter().chain([&chosen, &weighed]) {
            shaders.extend(answer.plan.launches.iter().map(|one| one.shader.clone()));
        }
    }
    println!("{runs} runs of {} kernels", shaders.len());
    assert_eq!(runs, wanted_runs);
}

/// Key lengths for two batch rows of K: among them none, one and all.
fn lengths(ix: usize, k_len: u32) -> Vec<u32> {
    let choices = [0, k_len, k_len / 2, k_len.min(1), k_len - k_len / 3];
    vec![choices[ix % 5], choices[(ix / 2 + 1) % 5]]
}

/// Queries and keys: odd, around the kernels' blocks of 32 and 64, Q above and below K.
const MANY: [[u32; 2]; 13] = [
    [3, 0],
    [33, 1],
    [5, 31],
    [7, 32],
    [31, 33],
    [32, 63],
    [33, 64],
    [65, 65],
    [40, 7],
    [9, 127],
    [8, 128],
    [3, 500],
    [11, 1500],
];
const ONE: [u32; 11] = [0, 1, 31, 32, 33, 63, 64, 65, 129, 500, 1500];

#[test]
fn every_length_under_every_mask_equals_the_oracle() {
    let mut cases = Vec::new();
    for causal in CAUSAL {
        for has_lengths in [false, true] {
            let many = MANY.iter().map(|&len| ([4, 2], len));
            let one = ONE.iter().map(|&k_len| ([2, 2], [1, k_len]));
            for (ix, (heads, len)) in many.chain(one).enumerate() {
                cases.push(Case {
                    causal,
                    kv_len: has_lengths.then(|| lengths(ix, len[1])),
                    ..Case::new([2, 2], heads, len, [12, 20])
                });
            }
        }
    }
    judge(gpu(), &cases, 5 * 6 * 24);
}

#[test]
fn every_head_dim_equals_the_oracle() {
    let dims = [
        [1, 1],
        [3, 3],
        [5, 70],
        [12, 12],
        [20, 300],
        [33, 33],
        [64, 1],
        [64, 64],
        [80, 80],
        [128, 128],
        [192, 128],
        [256, 256],
        [576, 512],
        [576, 576],
    ];
    let mut cases = Vec::new();
    for dim in dims {
        for (len, kv_len) in [([5, 37], vec![29, 37]), ([34, 70], vec![0, 65])] {
            cases.push(Case {
                causal: Some(Align::BottomRight),
                kv_len: Some(kv_len),
                ..Case::new([2, 2], [2, 1], len, dim)
            });
        }
    }
    judge(gpu(), &cases, 5 * 28);
}

#[test]
fn groups_of_heads_and_batch_rows_share_keys() {
    let mut cases = Vec::new();
    for heads in [[3, 3], [4, 2], [6, 2], [8, 1], [16, 2]] {
        for (batch, kv_len) in [
            ([4, 2], vec![31, 64]),
            ([3, 1], vec![50]),
            ([6, 3], vec![0, 70, 9]),
        ] {
            for len in [[1, 70], [5, 70]] {
                cases.push(Case {
                    causal: Some(Align::BottomRight),
                    kv_len: Some(kv_len.clone()),
                    ..Case::new(batch, heads, len, [12, 20])
                });
            }
        }
    }
    judge(gpu(), &cases, 5 * 30);
}

#[test]
fn beams_read_their_shared_histories() {
    let mut cases = Vec::new();
    for (heads, q_len) in [([2, 2], 1), ([4, 2], 5)] {
        for (k_len, kv_len) in [
            (33, vec![33, 7, 0, 32]),
            (130, vec![130, 129, 64, 1]),
            (600, vec![3, 600, 599, 65]),
        ] {
            for batch in [[4, 4], [8, 4]] {
                for (causal, kv_len) in [(None, Some(kv_len.clone())), (CAUSAL[1], None)] {
                    cases.push(Case {
                        histories: true,
                        causal,
                        kv_len,
                        ..Case::new(batch, heads, [q_len, k_len], [12, 20])
                    });
                }
            }
        }
    }
    judge(gpu(), &cases, 5 * 24);
}

#[test]
fn views_with_offsets_and_strides_equal_the_oracle() {
    let mut cases = Vec::new();
    for dim in [12, 11] {
        for place in [
            Place::Dense,
            Place::Columns,
            Place::Packed,
            Place::Gaps(4),
            Place::Gaps(3),
            Place::Transposed,
        ] {
            for len in [[9, 9], [35, 35]] {
                cases.push(Case {
                    place,
                    ..Case::new([2, 2], [4, 2], len, [dim, dim])
                });
            }
        }
    }
    judge(gpu(), &cases, 5 * 24);
}

#[test]
fn every_mix_of_storage_types_equals_the_oracle() {
    let mixes = [
        [F16, F16, F16, F16],
        [F32, F16, F16, F32],
        [F16, F32, BF16, F16],
        [F32, F16, F32, F16],
        [BF16, BF16, BF16, BF16],
        [F32, BF16, F16, F32],
        [BF16, F32, F32, BF16],
    ];
    let mut cases = Vec::new();
    for types in mixes {
        for dim in [[12, 20], [10, 7]] {
            for (len, kv_len) in [
                ([5, 37], vec![0, 37]),
                ([33, 65], vec![65, 40]),
                ([9, 500], vec![500, 257]),
            ] {
                cases.push(Case {
                    types,
                    causal: Some(Align::BottomRight),
                    kv_len: Some(kv_len),
                    ..Case::new([2, 2], [4, 2], len, dim)
                });
            }
        }
    }
    match gpu().caps().f16 {
        true => judge(gpu(), &cases, 5 * 42),
        false => println!("0 runs: this device has no f16"),
    }
}

#[test]
fn any_scale_and_large_scores_equal_the_oracle() {
    let mut cases = Vec::new();
    for len in [[5, 37], [33, 70]] {
        for scale in [0.0, 0.7, -1.5] {
            cases.push(Case {
                scale: Some(scale),
                ..Case::new([2, 2], [4, 2], len, [12, 20])
            });
        }
        cases.push(Case {
            loud: 1e4,
            ..Case::new([2, 2], [4, 2], len, [12, 20])
        });
        cases.push(Case {
            loud: 1e-6,
            ..Case::new([2, 2], [4, 2], len, [12, 20])
        });
    }
    judge(gpu(), &cases, 5 * 10);
}

#[test]
fn every_split_of_the_keys_equals_the_oracle_and_repeats_its_bits() {
    let mut runs = 0;
    let mut parts = HashSet::new();
    for (heads, q_len) in [([2, 2], 1), ([4, 2], 5)] {
        for k_len in [0, 1, 65, 130, 448, 1500] {
            let lengths = Some(vec![k_len, k_len / 3]);
            for (causal, kv_len) in [(None, None), (CAUSAL[1], lengths)] {
                let case = Case {
                    causal,
                    kv_len,
                    ..Case::new([2, 2], heads, [q_len, k_len], [12, 20])
                };
                let prepared = Prepared::new(gpu(), &case, 7);
                for splits in [1, 2, 3, 7] {
                    let [first, second] = [0, 1].map(|_| {
                        prepared
                            .run(Some(Route::Decode), Some(splits), None)
                            .unwrap()
                    });
                    assert_eq!(first, second, "the same bits in every run");
                    parts.insert(first.plan.splits);
                    runs += 2;
                }
            }
        }
    }
    println!("{runs} runs");
    assert_eq!(runs, 2 * 4 * 2 * 6 * 2);
    assert_eq!(parts, HashSet::from([1, 2, 3, 6, 7]));
}

/// Sequences of few queries beside long ones: each kind goes to kernels of its own, which see no other.
#[test]
fn short_ragged_sequences_go_to_decode() {
    let full = gpu().caps();
    let by_head = Caps {
        max_binding: 180_000,
        ..full.clone()
    };
    let devices = [
        full.clone(),
        teams_in_subgroups(),
        full.without_subgroups(),
        full.browser(),
        by_head,
    ]
    .map(|caps| gpu().narrowed(caps));
    let (mut runs, mut split, mut cut) = (0, 0, 0);
    for (heads, group) in [([4, 2], 2), ([3, 3], 1), ([8, 1], 8)] {
        for (lens, causal) in [
            (
                [vec![1, 70, 1, 0, 3, 33, 2], vec![300, 70, 0, 5, 41, 100, 9]],
                Some(Align::BottomRight),
            ),
            // Nothing but short ones, and none.
            ([vec![1; 40], (0..40).collect()], None),
            ([vec![50, 60], vec![60, 50]], Some(Align::TopLeft)),
            // Keys in parts.
            ([vec![1, 40], vec![1200, 900]], None),
        ] {
            let [q, k] = lens.each_ref().map(|lens| lens.iter().sum());
            let batch = lens[0].len() as u32;
            let case = Case {
                causal,
                sinks: causal.is_some(),
                bias: causal.is_none().then_some([true, false, false, true]),
                ragged: Some(lens),
                ..Case::new([batch, batch], heads, [q, k], [12, 20])
            };
            let mut prepared = Prepared::new(gpu(), &case, 11);
            for device in &devices {
                prepared = prepared.on(device);
                let [first, second] = [0, 1].map(|_| prepared.run(None, None, None).unwrap());
                assert_eq!(first, second, "the same bits in every run");
                let plan = first.plan;
                let (few, candidate) = plan.short.expect("a plan for short ones");
                assert!(few * group <= 16, "{few} queries");
                let routes = [plan.route, candidate.route];
                assert_eq!(routes, [Route::Prefill, Route::Decode]);
                split += usize::from(plan.splits > 1);
                let merges = plan
                    .launches
                    .iter()
                    .filter(|one| one.shader.kernel == "merge");
                cut += usize::from(merges.count() > 1);
                runs += 1;
            }
        }
    }
    println!("{runs} runs, {split} with keys in parts, {cut} with heads in parts");
    assert_eq!((runs, split, cut), (5 * 3 * 4, 15, 2));
}

/// The device's powers, but for subgroups that may be larger than a team of lanes: as on most GPUs.
pub fn teams_in_subgroups() -> Caps {
    let full = gpu().caps();
    Caps {
        subgroups: full.subgroups.map(|(least, _)| (least, 2 * least)),
        ..full.clone()
    }
}

/// A few cases that reach every kernel.
fn some_cases() -> Vec<Case> {
    let case = |len, kv_len| Case {
        causal: Some(Align::BottomRight),
        kv_len: Some(kv_len),
        ..Case::new([3, 3], [4, 2], len, [12, 20])
    };
    vec![
        case([5, 37], vec![37, 0, 20]),
        case([65, 70], vec![70, 33, 64]),
    ]
}

#[test]
fn every_set_of_powers_equals_the_oracle() {
    let full = gpu().caps();
    let folded = Caps {
        max_groups: 30,
        ..full.clone()
    };
    for caps in [
        full.clone(),
        teams_in_subgroups(),
        full.without_subgroups(),
        full.without_f16(),
        full.browser(),
        folded,
    ] {
        let narrow = gpu().narrowed(caps);
        judge(&narrow, &some_cases(), 10);
        let prepared = Prepared::new(&narrow, &some_cases()[1], 3);
        let split = prepared.run(Some(Route::Decode), Some(2), None).unwrap();
        assert_eq!(split.plan.splits, 2);
    }
}

#[test]
fn a_device_without_f16_refuses_it_by_name() {
    for caps in [gpu().caps().without_f16(), gpu().caps().browser()] {
        let narrow = gpu().narrowed(caps);
        for place in 0..4 {
            let mut types = [F32; 4];
            types[place] = F16;
            let case = Case {
                types,
                ..Case::new([1, 1], [1, 1], [2, 3], [4, 4])
            };
            let prepared = Prepared::new(&narrow, &case, 0);
            for route in Route::ALL.map(Some).into_iter().chain([None]) {
                let said = prepared.run(route, None, None).unwrap_err();
                assert!(said.contains("f16"), "{said}");
            }
        }
    }
}

#[test]
fn limits_of_the_device_are_refused_by_name() {
    let full = gpu().caps();
    let cases = some_cases();
    for (caps, word) in [
        (
            Caps {
                max_binding: 512,
                ..full.clone()
            },
            "bytes for one head of one batch row",
        ),
        (
            Caps {
                max_groups: 2,
                ..full.clone()
            },
            "the grid of",
        ),
        (
            Caps {
                max_buffer: 1024,
                ..full.clone()
            },
            "in one buffer",
        ),
    ] {
        let narrow = gpu().narrowed(caps);
        let prepared = Prepared::new(gpu(), &cases[1], 0).on(&narrow);
        let said = prepared.run(None, None, None).unwrap_err();
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn a_wrong_answer_is_objected_to() {
    let mut prepared = Prepared::new(gpu(), &some_cases()[0], 0);
    prepared.spoil();
    for route in Route::ALL {
        let said = prepared.run(Some(route), None, None).unwrap_err();
        assert!(
            said.contains("1 of 60 rows are wrong; first row 59"),
            "{said}"
        );
    }
}

#[test]
fn threads_read_back_from_one_device() {
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                let values = [thread, 1, 2, 3];
                for _ in 0..200 {
                    let tensor = gpu().upload_u32("tensor", &[4], &values).unwrap();
                    assert_eq!(gpu().read_u32(&tensor).unwrap(), values);
                }
            });
        }
    });
}
