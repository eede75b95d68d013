//! Attention's kernels, as plans ask for them.

use std::collections::HashSet;
use std::sync::OnceLock;

use qkv::Error;
use qkv::attention::{
    Align, Candidate, Options, Problem, Route, Stage, T5, Tensors, View, plan, plan_with,
};
use qkv::gpu::{Caps, DType, Matrices, Shader, Tensor};

use super::{BOTH, Device, MATRICES, SUBGROUPS, TYPES, matrix};
use crate::gpu;

/// D and Dv: the fused kernels are unrolled by them.
const DIMS: [[u32; 2]; 9] = [
    [1, 1],
    [12, 20],
    [32, 32],
    [33, 7],
    [64, 64],
    [128, 128],
    [192, 128],
    [256, 256],
    [576, 512],
];

/// The tensors that problems of every kind are made of.
struct Parts {
    inputs: [Tensor; 3],
    outputs: [Tensor; 3],
    table: Tensor,
    integers: Tensor,
    offsets: Tensor,
    cu: [Tensor; 2],
    rows: Tensor,
    pages: Tensor,
    blocks: [Tensor; 2],
    mask: Tensor,
    t5: Tensor,
    weights: Tensor,
}

impl Parts {
    /// With rows of blocks for heads of that many columns at most.
    fn new(columns: u32) -> Parts {
        let gpu = gpu();
        let make = |dtype| gpu.empty("tensor", dtype, &[1 << 19]).unwrap();
        Parts {
            inputs: TYPES.map(make),
            outputs: TYPES.map(make),
            table: gpu.empty("table", DType::F32, &[2]).unwrap(),
            integers: gpu.empty("integers", DType::U32, &[2]).unwrap(),
            offsets: gpu.empty("offsets", DType::I32, &[2]).unwrap(),
            cu: [0, 1].map(|_| gpu.empty("cu", DType::U32, &[3]).unwrap()),
            rows: gpu.empty("rows", DType::U32, &[2, 130]).unwrap(),
            pages: gpu.empty("pages", DType::U32, &[2, 1]).unwrap(),
            blocks: [DType::Q8_0, DType::Q4_0]
                .map(|dtype| gpu.empty("blocks", dtype, &[2 * 2 * 130, columns]).unwrap()),
            mask: gpu.empty("mask", DType::Bool, &[1, 1, 1, 130]).unwrap(),
            t5: gpu.empty("t5", DType::F32, &[8, 2]).unwrap(),
            weights: gpu.empty("bias", DType::F32, &[1, 1, 1, 130]).unwrap(),
        }
    }
}

/// Heads of so many rows and columns; not dense: with a gap behind each row.
fn view(tensor: &Tensor, [b, h, l, d]: [u32; 4], dense: bool) -> View<'_> {
    let gap = if dense { 0 } else { 1 };
    let row = d + gap;
    View::new(tensor, [b, h, l, d], gap, [h * l * row, l * row, row]).unwrap()
}

/// A view of as many columns of rows of blocks.
fn quantised<'t>(blocks: &'t Tensor, like: &View) -> View<'t> {
    let [b, h, l, d] = like.extents();
    let row = blocks.shape()[1];
    View::new(blocks, [b, h, l, d], 0, [h * l * row, l * row, row]).unwrap()
}

type Change = for<'a> fn(&mut Tensors<'a>, &mut Options, &'a Parts);

/// Options that change the text of a kernel.
const OPTIONS: [Change; 19] = [
    |_, o, _| o.causal = true,
    |_, o, _| (o.causal, o.align) = (true, Align::TopLeft),
    |_, o, _| o.window = [Some(3), None],
    |_, o, _| o.softcap = Some(2.0),
    |_, o, _| o.batch_invariant = true,
    |t, _, p| t.kv_len = Some(&p.integers),
    |t, _, p| t.q_offset = Some(&p.offsets),
    |t, _, p| t.prefix_len = Some(&p.integers),
    |t, _, p| t.rows = Some(&p.rows),
    |t, _, p| t.bias = Some(View::broadcast(&p.weights, [2, 2, t.q.extents()[2], 130]).unwrap()),
    |t, _, p| t.mask = Some(View::broadcast(&p.mask, [2, 2, t.q.extents()[2], 130]).unwrap()),
    |t, _, p| t.alibi = Some(&p.table),
    |t, o, p| {
        t.t5 = Some(&p.t5);
        o.t5 = Some(T5 {
            bidirectional: true,
            max_distance: 100,
        });
    },
    |t, _, p| t.sinks = Some(&p.table),
    |t, _, p| t.pages = Some(&p.pages),
    |t, _, p| [t.k, t.v] = [&t.k, &t.v].map(|view| quantised(&p.blocks[0], view)),
    |t, _, p| [t.k, t.v] = [&t.k, &t.v].map(|view| quantised(&p.blocks[1], view)),
    |t, o, p| {
        t.extra = vec![("slopes", &p.table)];
        let text =
            "fn score_mod(s: f32, b: u32, h: u32, q: u32, k: u32) -> f32 { return s - slopes[h]; }";
        o.score_mod = Some(text.into());
    },
    |_, o, _| {
        let text =
            "fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool { return q % 2u == k % 2u; }";
        o.mask_mod = Some(text.into());
    },
];

/// Every variant that plans ask for: each mix of types, dims and subgroups plain; each option and pair of
/// options; on devices that bind no more than every device does: those of the lists, or one alone. The answer
/// tells also how many plans were made and how many were refused for binding more.
fn planned(only: Option<Device>) -> (HashSet<Shader>, usize, usize) {
    let devices = |these: &[Option<(u32, u32)>]| match only {
        Some(device) => vec![device],
        None => (these.iter())
            .map(|&subgroups| Device(subgroups, 0, Matrices::Unused))
            .collect(),
    };
    let with_matrices: &[Device] = match &only {
        Some(device) => std::slice::from_ref(device),
        None => &MATRICES,
    };
    let gpu = gpu();
    let parts = Parts::new(32);
    let mut caps = gpu.caps().without_f16();
    (caps.f16, caps.f16_math, caps.storage_buffers) = (true, true, 8);
    (caps.workgroup_memory, caps.invocations) = (32_768, 256);
    let (mut shaders, mut plans, mut refused) = (HashSet::new(), 0, 0);
    let mut ask = |[q_len, d, dv]: [u32; 3],
                   types: [usize; 4],
                   dense,
                   Device(subgroups, m, matrices),
                   changes: &[usize],
                   ragged| {
        let [q, k, v, out] = types;
        let batch = if ragged { 1 } else { 2 };
        let mut tensors = Tensors::new(
            view(&parts.inputs[q], [batch, 2, q_len, d], dense),
            view(&parts.inputs[k], [batch, 2, 130, d], dense),
            view(&parts.inputs[v], [batch, 2, 130, dv], dense),
            view(&parts.outputs[out], [batch, 2, q_len, dv], dense),
        );
        if ragged {
            (tensors.cu_q, tensors.cu_k) = (Some(&parts.cu[0]), Some(&parts.cu[1]));
        }
        let lse = gpu.empty("lse", DType::F32, &[batch, 2, q_len]).unwrap();
        let weights = gpu
            .empty("weights", DType::F32, &[batch, 2, q_len, 130])
            .unwrap();
        let mut options = Options::default();
        for &ix in changes {
            OPTIONS[ix](&mut tensors, &mut options, &parts);
        }
        let caps = Caps {
            subgroups,
            cooperative: vec![matrix(m)],
            matrices,
            software: subgroups == SUBGROUPS[1],
            ..caps.clone()
        };
        let routes = [
            (Some(Route::ThreePass), None, None),
            (Some(Route::ThreePass), None, Some(Stage::Raw)),
            (Some(Route::ThreePass), None, Some(Stage::Biased)),
            (Some(Route::Prefill), None, None),
            (Some(Route::Decode), None, None),
            (Some(Route::Decode), Some(2), None),
            // Long sequences and short ones, each their own way.
            (None, None, None),
        ];
        let blocks = changes.iter().any(|ix| [15, 16].contains(ix));
        for (ix, (route, splits, stage)) in routes.into_iter().enumerate() {
            if options.batch_invariant && route == Some(Route::Prefill)
                || route.is_none() && !ragged
            {
                continue;
            }
            tensors.lse = (ix != 3 || changes.len() == 1).then_some(&lse);
            tensors.weights = stage.map(|_| &weights);
            (options.route, options.splits) = (route, splits);
            options.stage = stage.unwrap_or_default();
            let problem = Problem::new(&tensors, &options).unwrap();
            match plan(&problem, &caps) {
                Ok(plan) => shaders.extend(plan.launches.into_iter().map(|launch| launch.shader)),
                Err(Error::Refused { argument, .. }) => {
                    assert_eq!(argument, "the tensors of these options together");
                    refused += 1;
                }
                Err(other) => panic!("{other}"),
            }
            plans += 1;
            if route == Some(Route::Prefill) && types[..3] == [1; 3] && !blocks {
                options.f16_math = true;
                let problem = Problem::new(&tensors, &options).unwrap();
                let plan = plan(&problem, &caps).unwrap();
                shaders.extend(plan.launches.into_iter().map(|launch| launch.shader));
                options.f16_math = false;
                plans += 1;
            }
        }
        // What a measurement may choose instead.
        (tensors.weights, options.route, options.splits) = (None, None, None);
        for f16_math in BOTH {
            options.f16_math = f16_math;
            if changes.len() > 1 || f16_math && (types[..3] != [1; 3] || blocks) {
                continue;
            }
            let problem = Problem::new(&tensors, &options).unwrap();
            for kernel in Candidate::kernels(&problem, &caps) {
                let most = if kernel.route == Route::Decode { 2 } else { 1 };
                for splits in 1..=most {
                    let other = Some(Candidate { splits, ..kernel });
                    let plan = plan_with(&problem, &caps, other).unwrap();
                    shaders.extend(plan.launches.into_iter().map(|launch| launch.shader));
                    plans += 1;
                }
            }
        }
    };
    for mix in 0..81 {
        let types = [mix % 3, mix / 3 % 3, mix / 9 % 3, mix / 27];
        for dense in BOTH {
            for device in devices(&[SUBGROUPS[1], None]) {
                ask([9, 12, 20], types, dense, device, &[], false);
            }
        }
    }
    for [d, dv] in DIMS {
        for q_len in [1, 2, 4, 9] {
            for device in devices(&SUBGROUPS) {
                ask([q_len, d, dv], [0; 4], true, device, &[], false);
            }
        }
    }
    // What `prefill` multiplies in f16.
    for device in devices(&SUBGROUPS) {
        for [d, dv] in DIMS {
            ask([9, d, dv], [1; 4], true, device, &[], false);
        }
    }
    for option in (0..OPTIONS.len()).filter(|option| ![15, 16].contains(option)) {
        for device in devices(&[SUBGROUPS[1], None]) {
            let types = [1, 1, 1, 0];
            ask([70, 12, 20], types, false, device, &[option], false);
        }
    }
    for first in 0..OPTIONS.len() {
        for second in first..OPTIONS.len() {
            let changes: &[usize] = if first == second {
                &[first]
            } else {
                &[first, second]
            };
            if changes == [8, 14] {
                // Histories and pages are two ways to say the same.
                continue;
            }
            for device in devices(&[SUBGROUPS[1], SUBGROUPS[3], None]) {
                ask([70, 12, 20], [0; 4], false, device, changes, false);
                // Histories, lengths and pages are not to be had with ragged keys.
                if ![5, 8, 14].iter().any(|ix| changes.contains(ix)) {
                    ask([70, 12, 20], [0; 4], true, device, changes, true);
                }
            }
            for &device in with_matrices {
                // The other forms differ in what no option changes.
                if first == second || device == with_matrices[0] {
                    ask([70, 12, 20], [1; 4], false, device, changes, false);
                    if ![5, 8, 14].iter().any(|ix| changes.contains(ix)) {
                        ask([70, 12, 20], [1; 4], true, device, changes, true);
                    }
                }
            }
        }
    }
    for &device in with_matrices {
        for [d, dv] in DIMS {
            for out in 0..3 {
                for dense in BOTH {
                    ask([70, d, dv], [1, 1, 1, out], dense, device, &[], false);
                }
            }
        }
    }
    (shaders, plans, refused)
}

/// Every variant that plans ask for on one device, with each option at more head dims.
pub fn attention_of(device: Device) -> HashSet<Shader> {
    let (mut shaders, ..) = planned(Some(device));
    let Device(subgroups, m, matrices) = device;
    let mut caps = gpu().caps().without_f16();
    (caps.f16, caps.f16_math, caps.software) = (true, true, false);
    (caps.subgroups, caps.matrices) = (subgroups, matrices);
    caps.cooperative = vec![matrix(m)];
    for (d, dtype) in [64, 128, 256]
        .into_iter()
        .flat_map(|d| [0, 1].map(|dtype| (d, dtype)))
    {
        let parts = Parts::new(d);
        let changes = (0..OPTIONS.len()).map(Some).chain([None]);
        for (change, ragged) in changes.flat_map(|change| BOTH.map(|ragged| (change, ragged))) {
            // Histories, lengths and pages are not to be had with ragged keys.
            if ragged && matches!(change, Some(5 | 8 | 14)) {
                continue;
            }
            for (route, q_len, splits) in [
                (Some(Route::ThreePass), 70, None),
                (Some(Route::Prefill), 70, None),
                (Some(Route::Decode), 4, None),
                (Some(Route::Decode), 4, Some(2)),
                (None, 70, None),
            ] {
                let batch = if ragged { 1 } else { 2 };
                let mut tensors = Tensors::new(
                    view(&parts.inputs[dtype], [batch, 2, q_len, d], true),
                    view(&parts.inputs[dtype], [batch, 2, 130, d], true),
                    view(&parts.inputs[dtype], [batch, 2, 130, d], true),
                    view(&parts.outputs[dtype], [batch, 2, q_len, d], true),
                );
                if ragged {
                    (tensors.cu_q, tensors.cu_k) = (Some(&parts.cu[0]), Some(&parts.cu[1]));
                }
                let mut options = Options::default();
                if let Some(change) = change {
                    OPTIONS[change](&mut tensors, &mut options, &parts);
                }
                if options.batch_invariant && route == Some(Route::Prefill)
                    || route.is_none() && !ragged
                {
                    continue;
                }
                (options.route, options.splits) = (route, splits);
                let problem = Problem::new(&tensors, &options).unwrap();
                let plan = plan(&problem, &caps).unwrap();
                shaders.extend(plan.launches.into_iter().map(|launch| launch.shader));
            }
        }
    }
    shaders
}

/// Attention's variants.
pub fn attention_variants() -> &'static HashSet<Shader> {
    static ALL: OnceLock<HashSet<Shader>> = OnceLock::new();
    ALL.get_or_init(|| {
        let (mut all, plans, refused) = planned(None);
        println!("{plans} plans, {refused} refused");
        assert_eq!((plans, refused), (28_188, 0));
        for ((dtype, lse), vec) in [
            ("f32", true),
            ("f32", false),
            ("f16", false),
            ("bf16", false),
        ]
        .into_iter()
        .flat_map(|form| [(form, 1u32), (form, 4)])
        {
            all.extend(BOTH.map(|ragged| {
                Shader::new("combine")
                    .with("F16", dtype == "f16")
                    .with("O_TYPE", dtype)
                    .with("VEC", vec)
                    .with("HAS_LSE", lse)
                    .with("RAGGED", ragged)
            }));
        }
        all
    })
}
