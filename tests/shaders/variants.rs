//! Every variant of every kernel that plans and operations ask for.

use std::collections::{BTreeMap, HashSet};
use std::sync::OnceLock;

use qkv::Error;
use qkv::attention::{
    Align, Candidate, Options, Problem, Route, Stage, T5, Tensors, View, plan, plan_with,
};
use qkv::gpu::{Caps, CoopShape, DType, Matrices, Shader, Tensor};

use crate::gpu;

const FLOATS: [&str; 2] = ["f32", "f16"];
const BOTH: [bool; 2] = [false, true];
const VECTORS: [u32; 2] = [1, 4];

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

/// Smallest and largest subgroups of devices there are; none at all comes last.
const SUBGROUPS: [Option<(u32, u32)>; 7] = [
    Some((4, 4)),
    Some((8, 8)),
    Some((8, 32)),
    Some((32, 32)),
    Some((32, 64)),
    Some((128, 128)),
    None,
];

/// What kernels depend on of a device: subgroups, rows of cooperative matrices (none: 0), and what stands for
/// these.
#[derive(Clone, Copy, PartialEq)]
struct Device(Option<(u32, u32)>, u32, Matrices);

/// Devices with cooperative matrices.
const MATRICES: [Device; 5] = [
    Device(Some((32, 32)), 16, Matrices::Used),
    Device(Some((32, 64)), 16, Matrices::Used),
    Device(Some((32, 32)), 8, Matrices::Used),
    Device(Some((8, 8)), 16, Matrices::Plain),
    Device(Some((8, 8)), 8, Matrices::Plain),
];

/// The shape of square matrices with f16 operands and f32 sums.
pub fn matrix(m: u32) -> CoopShape {
    CoopShape {
        m,
        n: m,
        k: m,
        ab: "f16".into(),
        cr: "f32".into(),
    }
}

pub const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

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
/// options; on a device that binds no more than every device does. The answer tells also how many plans
/// were made and how many were refused for binding more.
fn planned() -> (HashSet<Shader>, usize, usize) {
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
            (Route::ThreePass, None, None),
            (Route::ThreePass, None, Some(Stage::Raw)),
            (Route::ThreePass, None, Some(Stage::Biased)),
            (Route::Prefill, None, None),
            (Route::Decode, None, None),
            (Route::Decode, Some(2), None),
        ];
        let blocks = changes.iter().any(|ix| [15, 16].contains(ix));
        for (ix, (route, splits, stage)) in routes.into_iter().enumerate() {
            if options.batch_invariant && route == Route::Prefill {
                continue;
            }
            tensors.lse = (ix != 3 || changes.len() == 1).then_some(&lse);
            tensors.weights = stage.map(|_| &weights);
            (options.route, options.splits) = (Some(route), splits);
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
            if route == Route::Prefill && types[..3] == [1; 3] && !blocks {
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
            for subgroups in [SUBGROUPS[1], None] {
                let device = Device(subgroups, 0, Matrices::Unused);
                ask([9, 12, 20], types, dense, device, &[], false);
            }
        }
    }
    for [d, dv] in DIMS {
        for q_len in [1, 2, 4, 9] {
            for subgroups in SUBGROUPS {
                let device = Device(subgroups, 0, Matrices::Unused);
                ask([q_len, d, dv], [0; 4], true, device, &[], false);
            }
        }
    }
    // What `prefill` multiplies in f16.
    for subgroups in SUBGROUPS {
        let device = Device(subgroups, 0, Matrices::Unused);
        for [d, dv] in DIMS {
            ask([9, d, dv], [1; 4], true, device, &[], false);
        }
    }
    for option in (0..OPTIONS.len()).filter(|option| ![15, 16].contains(option)) {
        for subgroups in [SUBGROUPS[1], None] {
            let device = Device(subgroups, 0, Matrices::Unused);
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
            for subgroups in [SUBGROUPS[1], SUBGROUPS[3], None] {
                let device = Device(subgroups, 0, Matrices::Unused);
                ask([70, 12, 20], [0; 4], false, device, changes, false);
                // Histories, lengths and pages are not to be had with ragged keys.
                if ![5, 8, 14].iter().any(|ix| changes.contains(ix)) {
                    ask([70, 12, 20], [0; 4], true, device, changes, true);
                }
            }
            for device in MATRICES {
                // The other forms differ in what no option changes.
                if first == second || device == MATRICES[0] {
                    ask([70, 12, 20], [1; 4], false, device, changes, false);
                    if ![5, 8, 14].iter().any(|ix| changes.contains(ix)) {
                        ask([70, 12, 20], [1; 4], true, device, changes, true);
                    }
                }
            }
        }
    }
    for device in MATRICES {
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

/// Attention's kernels as planned with each option, ragged and not, for devices of 64 lanes and of 8 to 32: the name says
/// how.
pub fn with_options() -> BTreeMap<String, Shader> {
    let mut caps = gpu().caps().without_f16();
    (caps.f16, caps.f16_math, caps.software) = (true, true, false);
    let mut named = BTreeMap::new();
    for (d, dtype) in [(64, 0), (128, 0), (128, 1)] {
        let parts = Parts::new(d);
        let changes = (0..OPTIONS.len()).map(Some).chain([None]);
        for (change, ragged) in changes.flat_map(|change| BOTH.map(|ragged| (change, ragged))) {
            // Histories, lengths and pages are not to be had with ragged keys.
            if ragged && matches!(change, Some(5 | 8 | 14)) {
                continue;
            }
            for (lanes, subgroups) in [("64", (64, 64)), ("8-32", (8, 32))] {
                caps.subgroups = Some(subgroups);
                for (route, q_len, splits) in [
                    (Route::ThreePass, 70, None),
                    (Route::Prefill, 70, None),
                    (Route::Decode, 4, None),
                    (Route::Decode, 4, Some(2)),
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
                    if options.batch_invariant && route == Route::Prefill {
                        continue;
                    }
                    (options.route, options.splits) = (Some(route), splits);
                    let problem = Problem::new(&tensors, &options).unwrap();
                    let plan = plan(&problem, &caps).unwrap();
                    for launch in plan.launches {
                        let kernel = launch.shader.kernel;
                        let change = change.map_or("plain".into(), |ix| format!("option {ix}"));
                        let parts = splits.map_or("", |_| ", parts");
                        let ragged = if ragged { ", ragged" } else { "" };
                        let dtype = TYPES[dtype].name();
                        let name = format!(
                            "{kernel}-{dtype}-{d}-{lanes} ({route:?}, {change}{parts}{ragged})"
                        );
                        named.insert(name, launch.shader);
                    }
                }
            }
        }
    }
    named
}

/// Attention's variants.
pub fn attention_variants() -> &'static HashSet<Shader> {
    static ALL: OnceLock<HashSet<Shader>> = OnceLock::new();
    ALL.get_or_init(|| {
        let (mut all, plans, refused) = planned();
        println!("{plans} plans, {refused} refused");
        assert_eq!((plans, refused), (28_746, 0));
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

/// The variants of a kernel for weights in blocks.
fn in_blocks(shader: &Shader, software: bool) -> impl Iterator<Item = Shader> {
    ["q8_0", "q4_0", "q4_1"].into_iter().map(move |w| {
        let shader = shader.clone().with("W_TYPE", w);
        shader.with("SOFTWARE", software)
    })
}

/// The variants of everything around attention.
pub fn other_variants() -> Vec<Shader> {
    let mut all = Vec::new();
    // A processor with subgroups and without, then hardware with few rows and many.
    for (rows, slices, split, by_lanes) in [
        (&[1u32, 2, 4, 8][..], 1u32, true, true),
        (&[1, 2, 4], 1, true, false),
        (&[1, 2, 4], 8, true, false),
        (&[4, 8], 8, false, false),
    ] {
        let vectors = if by_lanes { &[1u32][..] } else { &VECTORS };
        for (&rows, &vec) in rows
            .iter()
            .flat_map(|rows| vectors.iter().map(move |vec| (rows, vec)))
        {
            for has_bias in BOTH {
                for has_residual in BOTH {
                    for activation in ["none", "relu", "gelu", "gelu_tanh", "silu"] {
                        for [x, w, y] in [
                            ["f32"; 3],
                            ["f16"; 3],
                            ["f16", "f16", "f32"],
                            ["f32", "f16", "f32"],
                            ["f16", "f32", "f16"],
                            ["f16", "f32", "f32"],
                            ["f32", "blocks", "f32"],
                            ["f16", "blocks", "f16"],
                            ["f16", "blocks", "f32"],
                        ] {
                            for gated in BOTH {
                                let shader = Shader::new("matmul")
                                    .with("F16", [x, w, y].contains(&"f16"))
                                    .with("T", x)
                                    .with("O_TYPE", y)
                                    .with("VEC", vec)
                                    .with("ROWS", rows)
                                    .with("SLICES", slices)
                                    .with("SPLIT", split)
                                    .with("BY_LANES", by_lanes)
                                    .with("HAS_BIAS", has_bias)
                                    .with("HAS_RESIDUAL", has_residual)
                                    .with("GATED", gated)
                                    .with("ACTIVATION", activation);
                                if w != "blocks" {
                                    all.push(shader.with("W_TYPE", w));
                                } else if vec == 4 || by_lanes {
                                    all.extend(in_blocks(&shader, slices == 1));
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    for Device(subgroups, m, matrices) in MATRICES {
        let (least, most) = subgroups.unwrap();
        let plain = matrices == Matrices::Plain;
        for (y, gated) in FLOATS.iter().flat_map(|&y| BOTH.map(|gated| (y, gated))) {
            for (has_bias, has_residual) in BOTH.iter().flat_map(|&b| BOTH.map(|r| (b, r))) {
                for activation in ["none", "relu", "gelu", "gelu_tanh", "silu"] {
                    let shader = Shader::new("matmul_coop")
                        .with("F16", true)
                        .with("T", "f16")
                        .with("O_TYPE", y)
                        .with("HAS_BIAS", has_bias)
                        .with("HAS_RESIDUAL", has_residual)
                        .with("GATED", gated)
                        .with("ACTIVATION", activation)
                        .with("M", m)
                        .with("LANES", if plain { 32 } else { most })
                        .with("FIXED", least == most)
                        .with("PLAIN", plain)
                        .with("SOFTWARE", plain)
                        .with("BY_LANES", false);
                    let dense = shader.clone().with("W_TYPE", "f16");
                    all.extend(VECTORS.map(|vec| dense.clone().with("VEC", vec)));
                    if y == "f16" {
                        for storage in ["q8_0", "q4_0", "q4_1"] {
                            let shader = shader.clone().with("VEC", 4u32);
                            all.push(shader.with("W_TYPE", storage));
                        }
                    }
                }
            }
        }
    }
    for t in FLOATS {
        for rms in BOTH {
            for has_rows in BOTH {
                all.push(
                    Shader::new("norm")
                        .with("F16", t == "f16")
                        .with("T", t)
                        .with("RMS", rms)
                        .with("HAS_ROWS", has_rows),
                );
            }
        }
        let stored = ["f32", "f16", "bf16", "q8_0", "q4_0"];
        for [k, v] in stored.iter().flat_map(|&k| stored.map(|v| [k, v])) {
            for has_places in BOTH {
                for qk_norm in BOTH {
                    for (rotary, page) in ["none", "halves", "neighbours"]
                        .into_iter()
                        .flat_map(|rotary| [0u32, 5].map(|page| (rotary, page)))
                    {
                        all.push(
                            Shader::new("append")
                                .with("F16", [t, k, v].contains(&"f16"))
                                .with("T", t)
                                .with("K_TYPE", k)
                                .with("V_TYPE", v)
                                .with("HAS_PLACES", has_places)
                                .with("QK_NORM", qk_norm)
                                .with("ROTARY", rotary)
                                .with("PAGE", page)
                                .with("HEAD_DIM", 96u32),
                        );
                    }
                }
            }
        }
        for has_positions in BOTH {
            for has_lengths in BOTH {
                let embed = Shader::new("embed")
                    .with("T", t)
                    .with("HAS_POSITIONS", has_positions)
                    .with("HAS_LENGTHS", has_lengths);
                for w in FLOATS {
                    let f16 = [t, w].contains(&"f16");
                    all.push(embed.clone().with("F16", f16).with("W_TYPE", w));
                }
                all.extend(in_blocks(&embed.with("F16", t == "f16"), false));
            }
        }
    }
    for candidates in [1u32, 2, 8, 64] {
        for renormalize in [false, true] {
            let shader = Shader::new("choose").with("CANDIDATES", candidates);
            all.push(shader.with("RENORMALIZE", renormalize));
        }
    }
    all.push(Shader::new("copy_page"));
    for t in FLOATS {
        for work in ["multiply_adds", "read", "copy"] {
            let shader = Shader::new("limits").with("F16", t == "f16");
            all.push(shader.with("T", t).with("WORK", work));
        }
    }
    for top_k in BOTH {
        for top_p in BOTH {
            all.push(
                Shader::new("sample")
                    .with("TOP_K", top_k)
                    .with("TOP_P", top_p),
            );
        }
    }
    for beams in [2u32, 4, 32] {
        all.push(Shader::new("reorder").with("BEAMS", beams));
    }
    all
}
