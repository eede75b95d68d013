//! Attention on every route against the oracle, row by row, and what it refuses.
//!
//! A case runs on every route, by the plan's own choice, and with its weights: five runs. Each test
//! prints and asserts how many runs there were.

#[path = "support/compare.rs"]
mod compare;
#[path = "support/grid.rs"]
mod grid;

use std::collections::HashSet;
use std::sync::OnceLock;

use grid::{Case, Place, Prepared};
use qkv::Error;
use qkv::attention::{
    Align, MAX_HEAD_DIM, Options, Plan, Problem, Route, Tensors, View, plan, record,
};
use qkv::gpu::{Caps, DType, Gpu, Recorder, Tensor};

const F16: DType = DType::F16;
const F32: DType = DType::F32;

/// The masks that are ranges: none, causal in both alignments; each with and without key lengths.
const CAUSAL: [Option<Align>; 3] = [None, Some(Align::BottomRight), Some(Align::TopLeft)];

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| Gpu::new().expect("a device: see scripts/with-gpu"))
}

/// Runs every case on every route and by the plan's choice, and asserts the number of runs.
#[track_caller]
fn judge(gpu: &Gpu, cases: &[Case], wanted_runs: usize) {
    let mut runs = 0;
    let mut shaders = HashSet::new();
    for (seed, case) in cases.iter().enumerate() {
        let prepared = Prepared::new(gpu, case, seed as u64);
        let mut forced = Vec::new();
        for route in Route::ALL {
            let answer = prepared.run(Some(route), None, false).unwrap();
            assert_eq!(answer.plan.route, route);
            forced.push(answer);
        }
        // The same plan gives the same bits.
        let chosen = prepared.run(None, None, false).unwrap();
        let same = forced.iter().find(|answer| answer.plan == chosen.plan);
        assert_eq!(same.expect("a forced route").out, chosen.out, "{case:?}");
        let weighed = prepared.run(None, None, true).unwrap();
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
        ] {
            for len in [[9, 9], [35, 35]] {
                cases.push(Case {
                    place,
                    ..Case::new([2, 2], [4, 2], len, [dim, dim])
                });
            }
        }
    }
    judge(gpu(), &cases, 5 * 20);
}

#[test]
fn every_mix_of_storage_types_equals_the_oracle() {
    let mixes = [
        [F16, F16, F16],
        [F32, F16, F32],
        [F16, F32, F16],
        [F32, F32, F16],
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
        true => judge(gpu(), &cases, 5 * 24),
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
                            .run(Some(Route::Decode), Some(splits), false)
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
        full.without_subgroups(),
        full.without_f16(),
        full.browser(),
        folded,
    ] {
        let narrow = gpu().narrowed(caps);
        judge(&narrow, &some_cases(), 10);
        let prepared = Prepared::new(&narrow, &some_cases()[1], 3);
        let split = prepared.run(Some(Route::Decode), Some(2), false).unwrap();
        assert_eq!(split.plan.splits, 2);
    }
}

#[test]
fn a_device_without_f16_refuses_it_by_name() {
    for caps in [gpu().caps().without_f16(), gpu().caps().browser()] {
        let narrow = gpu().narrowed(caps);
        for place in 0..3 {
            let mut types = [F32; 3];
            types[place] = F16;
            let case = Case {
                types,
                ..Case::new([1, 1], [1, 1], [2, 3], [4, 4])
            };
            let prepared = Prepared::new(&narrow, &case, 0);
            for route in Route::ALL.map(Some).into_iter().chain([None]) {
                let said = prepared.run(route, None, false).unwrap_err();
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
                max_binding: 1024,
                ..full.clone()
            },
            "a tensor of shape",
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
        let said = prepared.run(None, None, false).unwrap_err();
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn a_wrong_answer_is_objected_to() {
    let mut prepared = Prepared::new(gpu(), &some_cases()[0], 0);
    prepared.spoil();
    for route in Route::ALL {
        let said = prepared.run(Some(route), None, false).unwrap_err();
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

/// Tensors that bad problems are made of: views into two large buffers.
struct Parts {
    input: Tensor,
    integers: Tensor,
    halves: Tensor,
    output: Tensor,
}

impl Parts {
    fn new() -> Self {
        let make = |name, dtype| gpu().empty(name, dtype, &[1 << 16]).unwrap();
        Parts {
            input: make("input", F32),
            integers: make("integers", DType::U32),
            halves: make("halves", F16),
            output: make("output", F32),
        }
    }

    /// A sound problem: B 2, H 4, Hk 2, Q 5, K 7, D 12, Dv 8.
    fn tensors(&self) -> Tensors<'_> {
        Tensors {
            q: dense(&self.input, [2, 4, 5, 12]),
            k: dense(&self.input, [2, 2, 7, 12]),
            v: dense(&self.input, [2, 2, 7, 8]),
            out: dense(&self.output, [2, 4, 5, 8]),
            kv_len: None,
            rows: None,
            weights: None,
        }
    }
}

fn dense(tensor: &Tensor, extents: [u32; 4]) -> View<'_> {
    let [_, h, l, d] = extents;
    View::new(tensor, extents, 0, [h * l * d, l * d, d]).unwrap()
}

/// The argument that a refusal names.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: qkv::Result<T>) -> String {
    match result {
        Err(Error::Refused { argument, .. }) => argument,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn bad_problems_are_refused_by_the_argument_at_fault() {
    let parts = Parts::new();
    let tensor = |dtype, shape: &[u32]| gpu().empty("odd", dtype, shape).unwrap();
    let odd = [
        tensor(DType::U32, &[3]),
        tensor(F32, &[2]),
        tensor(DType::U32, &[2, 6]),
        tensor(F32, &[2, 7]),
        tensor(F32, &[2, 4, 5, 6]),
        tensor(DType::U32, &[2, 4, 5, 7]),
        tensor(F32, &[2, 4, 5, 7]),
    ];
    let [
        three_lengths,
        float_lengths,
        short_rows,
        float_rows,
        narrow_weights,
        integer_weights,
        weights,
    ] = &odd;
    // Over the output's buffer, and over the input's.
    let over = |tensor: &Tensor, dtype, shape: &[u32]| {
        Tensor::from_wgpu(tensor.buffer().clone(), dtype, shape).unwrap()
    };
    let weights_in_output = over(&parts.output, F32, &[2, 4, 5, 7]);
    let weights_in_input = over(&parts.input, F32, &[2, 4, 5, 7]);
    let lengths_in_output = over(&parts.output, DType::U32, &[2]);
    let rows_in_output = over(&parts.output, DType::U32, &[2, 7]);

    type Spoil<'a> = Box<dyn Fn(&mut Tensors<'a>, &mut Options) + 'a>;
    fn table<'a>(
        name: &'static str,
        spoil: impl Fn(&mut Tensors<'a>, &mut Options) + 'a,
    ) -> (&'static str, Spoil<'a>) {
        (name, Box::new(spoil))
    }
    let (input, output) = (&parts.input, &parts.output);
    let (integers, halves) = (&parts.integers, &parts.halves);
    let view = dense;
    let cases = [
        table("q", |t, _| t.q = view(input, [0, 4, 5, 12])),
        table("q", |t, _| t.q = view(input, [2, 0, 5, 12])),
        table("q", |t, _| t.q = view(input, [2, 4, 5, 0])),
        table("k", |t, _| t.k = view(input, [2, 0, 7, 12])),
        table("k", |t, _| t.k = view(input, [0, 2, 7, 12])),
        table("v", |t, _| t.v = view(input, [2, 2, 7, 0])),
        table("k's batch", |t, _| t.k = view(input, [3, 2, 7, 12])),
        table("k's heads", |t, _| t.k = view(input, [2, 3, 7, 12])),
        table("k's heads", |t, _| t.k = view(input, [2, 8, 7, 12])),
        table("k's head dim", |t, _| t.k = view(input, [2, 2, 7, 8])),
        table("v", |t, _| t.v = view(input, [2, 2, 6, 8])),
        table("v", |t, _| t.v = view(input, [2, 4, 7, 8])),
        table("v", |t, _| t.v = view(input, [1, 2, 7, 8])),
        table("out", |t, _| t.out = view(output, [2, 4, 5, 12])),
        table("out", |t, _| t.out = view(output, [2, 4, 6, 8])),
        table("out", |t, _| t.out = view(input, [2, 4, 5, 8])),
        table("the head dim", |t, _| {
            t.q = view(input, [2, 4, 5, MAX_HEAD_DIM + 1]);
            t.k = view(input, [2, 2, 7, MAX_HEAD_DIM + 1]);
        }),
        table("the head dim", |t, _| {
            t.v = view(input, [2, 2, 7, MAX_HEAD_DIM + 1]);
            t.out = view(output, [2, 4, 5, MAX_HEAD_DIM + 1]);
        }),
        table("q", |t, _| t.q = view(integers, [2, 4, 5, 12])),
        table("k", |t, _| t.k = view(integers, [2, 2, 7, 12])),
        table("out", |t, _| t.out = view(integers, [2, 4, 5, 8])),
        table("v's type", |t, _| t.v = view(halves, [2, 2, 7, 8])),
        table("scale", |_, o| o.scale = Some(f32::NAN)),
        table("scale", |_, o| o.scale = Some(f32::INFINITY)),
        table("kv_len", |t, _| t.kv_len = Some(three_lengths)),
        table("kv_len", |t, _| t.kv_len = Some(float_lengths)),
        table("out", |t, _| t.kv_len = Some(&lengths_in_output)),
        table("rows", |t, _| t.rows = Some(short_rows)),
        table("rows", |t, _| t.rows = Some(float_rows)),
        table("out", |t, _| t.rows = Some(&rows_in_output)),
        table("weights", |t, _| t.weights = Some(narrow_weights)),
        table("weights", |t, _| t.weights = Some(integer_weights)),
        table("weights", |t, _| t.weights = Some(&weights_in_output)),
        table("weights", |t, _| t.weights = Some(&weights_in_input)),
        table("route", |t, o| {
            t.weights = Some(weights);
            o.route = Some(Route::Prefill);
        }),
        table("route", |t, o| {
            t.weights = Some(weights);
            o.route = Some(Route::Decode);
        }),
        table("splits", |_, o| {
            o.route = Some(Route::Decode);
            o.splits = Some(0);
        }),
        table("splits", |_, o| {
            o.route = Some(Route::Prefill);
            o.splits = Some(2);
        }),
        table("splits", |_, o| {
            o.route = Some(Route::ThreePass);
            o.splits = Some(2);
        }),
        // An output whose rows share cells would be written by several workgroups at once.
        table("out", |t, _| {
            t.out = View::new(output, [2, 4, 5, 8], 0, [160, 0, 8]).unwrap();
        }),
        table("out", |t, _| {
            t.out = View::new(output, [2, 4, 5, 8], 0, [160, 40, 7]).unwrap();
        }),
        // More scores than 32 bits count, though of few cells.
        table("q", |t, o| {
            let zero = [0, 0, 0];
            t.q = View::new(input, [1, 1, 1 << 16, 1], 0, zero).unwrap();
            t.k = View::new(input, [1, 1, 70_000, 1], 0, zero).unwrap();
            t.v = View::new(input, [1, 1, 70_000, 1], 0, zero).unwrap();
            t.out = View::new(output, [1, 1, 1 << 16, 1], 0, [0, 0, 1]).unwrap();
            o.route = Some(Route::ThreePass);
        }),
    ];
    let count = cases.len();
    for (ix, (argument, spoil)) in cases.into_iter().enumerate() {
        let (mut tensors, mut options) = (parts.tensors(), Options::default());
        spoil(&mut tensors, &mut options);
        let mut recorder = Recorder::new(gpu());
        let result = record(&mut recorder, &tensors, &options);
        assert_eq!(refused(result), argument, "case {ix}");
    }
    println!("{count} problems refused");
    assert_eq!(count, 42);
    assert!(Problem::new(&parts.tensors(), &Options::default()).is_ok());
}

#[test]
fn views_outside_their_tensor_are_refused() {
    let tensor = gpu().empty("tensor", F32, &[2, 3, 4, 5]).unwrap();
    assert!(View::bhld(&tensor).is_ok());
    let bad = [
        ([2, 3, 4, 5], 1, [60, 20, 5]),
        ([2, 3, 4, 5], 0, [61, 20, 5]),
        ([2, 3, 4, 5], 0, [60, 21, 5]),
        ([2, 3, 4, 5], 0, [60, 20, 6]),
        ([3, 3, 4, 5], 0, [60, 20, 5]),
        ([1, 1, 1, 121], 0, [0, 0, 0]),
        ([1, 1, 1, 1], 120, [0, 0, 0]),
        ([2, 2, 2, 2], u32::MAX, [u32::MAX; 3]),
        ([u32::MAX; 4], 0, [u32::MAX; 3]),
    ];
    for (extents, offset, strides) in bad {
        let argument = refused(View::new(&tensor, extents, offset, strides));
        assert_eq!(argument, "a view");
    }
    assert_eq!(
        refused(View::packed(&tensor, [2, 3, 4, 5], 15, 1)),
        "a view"
    );
    let flat = gpu().empty("flat", F32, &[120]).unwrap();
    assert_eq!(refused(View::bhld(&flat)), "a view of [B, H, L, D]");
    let short = Tensor::from_wgpu(flat.buffer().clone(), F32, &[121]);
    assert_eq!(refused(short), "buffer");
}

/// The powers of a device that is not there.
fn caps() -> Caps {
    Caps {
        name: "none".into(),
        f16: true,
        subgroups: Some((32, 32)),
        cooperative: Vec::new(),
        timestamps: true,
        workgroup_memory: 48 << 10,
        invocations: 1024,
        storage_buffers: 16,
        max_binding: 1 << 31,
        max_buffer: 1 << 31,
        max_groups: 65_535,
        uniform_align: 64,
    }
}

/// The plan for dense f32 tensors with overlapping cells: a plan asks for extents only.
fn planned(
    [batch, heads, kv_heads]: [u32; 3],
    [q_len, k_len]: [u32; 2],
    [d, dv]: [u32; 2],
    options: &Options,
    caps: &Caps,
) -> qkv::Result<Plan> {
    let parts = Parts::new();
    let view = |tensor, extents| View::new(tensor, extents, 0, [0, 0, 0]).unwrap();
    let out = gpu().empty("out", F32, &[batch, heads, q_len, dv]).unwrap();
    let tensors = Tensors {
        q: view(&parts.input, [batch, heads, q_len, d]),
        k: view(&parts.input, [batch, kv_heads, k_len, d]),
        v: view(&parts.input, [batch, kv_heads, k_len, dv]),
        out: View::bhld(&out).unwrap(),
        kv_len: None,
        rows: None,
        weights: None,
    };
    plan(&Problem::new(&tensors, options)?, caps)
}

#[test]
fn the_plan_takes_decode_for_few_rows_and_prefill_for_many() {
    let options = Options::default();
    for (heads, q_len, route) in [
        ([1, 8, 8], 1, Route::Decode),
        ([1, 64, 1], 1, Route::Decode),
        ([1, 8, 8], 8, Route::Decode),
        ([1, 8, 8], 9, Route::Prefill),
        ([1, 8, 2], 2, Route::Decode),
        ([1, 8, 2], 3, Route::Prefill),
        ([4, 2, 2], 500, Route::Prefill),
    ] {
        let plan = planned(heads, [q_len, 100], [64, 64], &options, &caps()).unwrap();
        assert_eq!(plan.route, route, "{heads:?} {q_len}");
    }
}

#[test]
fn the_plan_depends_on_nothing_but_its_arguments() {
    let options = Options::default();
    let make = |caps: &Caps| planned([2, 4, 2], [3, 1000], [64, 80], &options, caps).unwrap();
    assert_eq!(make(&caps()), make(&caps()));
    assert_eq!(make(&caps()), make(&caps().browser()));
}

#[test]
fn long_keys_are_split_until_the_device_is_busy() {
    let options = Options::default();
    for (batch, k_len, splits) in [
        (1, 511, 1),
        (1, 1024, 2),
        (1, 4096, 8),
        (1, 1 << 20, 256),
        (8, 1 << 20, 32),
        (256, 1 << 20, 1),
    ] {
        let plan = planned([batch, 1, 1], [1, k_len], [64, 64], &options, &caps()).unwrap();
        assert_eq!(plan.splits, splits, "{batch} {k_len}");
        assert!(plan.split_len.is_multiple_of(64));
        assert!(plan.splits * plan.split_len >= k_len);
        assert_eq!(plan.launches.len(), if splits > 1 { 2 } else { 1 });
        assert_eq!(plan.launches[0].groups, u64::from(batch * splits));
        let parts = u64::from(batch * splits * (64 + 2));
        assert_eq!(plan.scratch, if splits > 1 { parts } else { 0 });
    }
}

#[test]
fn forced_splits_are_whole_steps_and_cover_the_keys() {
    for k_len in [0, 1, 63, 64, 65, 130, 449, 1500, 100_000] {
        for splits in 1..40 {
            let options = Options {
                route: Some(Route::Decode),
                splits: Some(splits),
                ..Options::default()
            };
            let plan = planned([1, 1, 1], [1, k_len], [8, 8], &options, &caps()).unwrap();
            assert!(plan.splits >= 1 && plan.splits <= splits);
            assert!(plan.splits * plan.split_len >= k_len);
            assert!(
                (plan.splits - 1) * plan.split_len < k_len.max(1),
                "no idle part"
            );
        }
    }
}

#[test]
fn every_route_is_planned_for_the_least_device() {
    let least = caps().browser();
    for [d, dv] in [
        [1, 1],
        [33, 7],
        [64, 64],
        [192, 128],
        [256, 256],
        [576, 576],
    ] {
        for route in Route::ALL {
            let options = Options {
                route: Some(route),
                ..Options::default()
            };
            let plan = planned([3, 6, 2], [70, 900], [d, dv], &options, &least).unwrap();
            assert_eq!(plan.route, route);
            assert!(plan.launches.iter().all(|launch| launch.groups > 0));
        }
    }
}
