//! Results over some of the keys, and their merging: keys spread over devices, and those that sequences share.

use super::{Options, Plan, Tensors, View, record};
use crate::gpu::{DType, Gpu, Recorder, Shader, Tensor};
use crate::{Error, Result};

/// A result over some of the keys of its rows.
#[derive(Clone, Copy, Debug)]
pub struct Partial<'a> {
    /// The result over these keys. f32 `[B, H, Q, Dv]`
    pub out: &'a Tensor,
    /// The natural logarithm of each row's denominator; -inf where the part is empty. f32 `[B, H, Q]`
    pub lse: &'a Tensor,
}

/// Records the merging of two partial results into `into`, of any float type, which is as if their keys had been
/// attended to at once: for cascades, shared prefixes, and keys spread over devices (FlashInfer's merge of
/// attention states). `lse`, f32 `[B, H, Q]`, takes the LSE of both. More than two are merged one after the other,
/// through f32 `[B, H, Q, Dv]` between them; the order changes only the rounding. What is written needs buffers
/// of its own.
///
/// # Errors
/// [`Error::Refused`] where shapes or types do not agree, and for f16 on a device without it.
pub fn merge(
    recorder: &mut Recorder,
    parts: [Partial; 2],
    into: &View,
    lse: Option<&Tensor>,
) -> Result<()> {
    merge_rows(recorder, parts, None, into, lse)
}

/// [`merge`]; of parts of ragged sequences, whose rows end with the last of `cu_q`, those rows alone.
fn merge_rows(
    recorder: &mut Recorder,
    parts: [Partial; 2],
    cu_q: Option<[&Tensor; 2]>,
    into: &View,
    lse: Option<&Tensor>,
) -> Result<()> {
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct Params {
        count: u32,
        value_dim: u32,
        heads: u32,
        rows: u32,
        o_at: [u32; 4],
        columns: [u32; 4],
        minus_infinity: f32,
        sequences: [u32; 2],
        unused: u32,
    }
    let extents = into.extents();
    let [b, heads, rows, value_dim] = extents;
    for (name, part) in ["the first part", "the second part"].iter().zip(&parts) {
        let agrees = part.out.shape() == extents
            && part.lse.shape() == [b, heads, rows]
            && part.out.dtype() == DType::F32
            && part.lse.dtype() == DType::F32;
        if !agrees {
            return Err(Error::refused(
                *name,
                format_args!("out {:?}, lse {:?}", part.out.shape(), part.lse.shape()),
                format!("f32, out {extents:?} and an lse for each of its rows"),
            ));
        }
    }
    if let Some(lse) = lse
        && (lse.shape() != [b, heads, rows] || lse.dtype() != DType::F32)
    {
        let bound = format!("f32 {:?}", [b, heads, rows]);
        return Err(Error::refused(
            "lse",
            format_args!("{:?}", lse.shape()),
            bound,
        ));
    }
    let dtype = into.tensor.dtype();
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) || !into.layout.disjoint() {
        let bound = "f32, f16 or bf16, each element in a place of its own";
        let what = format_args!("{} of {:?}", dtype.name(), into.layout.strides);
        return Err(Error::refused("into", what, bound));
    }
    if dtype == DType::F16 && !recorder.gpu().caps().f16 {
        let bound = "f32 or bf16: this device has no f16 in shaders";
        return Err(Error::refused("the storage type of into", "f16", bound));
    }
    let read = parts.iter().flat_map(|part| [part.out, part.lse]);
    let read: Vec<&Tensor> = read.collect();
    for (name, tensor) in [("into", Some(into.tensor)), ("lse", lse)] {
        let Some(tensor) = tensor else { continue };
        let other = (name == "lse").then_some(into.tensor);
        let mut others = read.iter().copied().chain(other);
        if others.any(|other| other.buffer() == tensor.buffer()) {
            let bound = "a buffer of its own";
            return Err(Error::refused(name, "in another's buffer", bound));
        }
    }
    let elements: u64 = extents.iter().map(|&n| u64::from(n)).product();
    if elements > u64::from(u32::MAX) {
        let bound = "fewer than 2^32 elements";
        return Err(Error::refused("into", format_args!("{extents:?}"), bound));
    }
    let count = b * heads * rows * value_dim.div_ceil(4);
    let [sb, sh, sl, sd] = into.layout.strides;
    let params = Params {
        count,
        value_dim,
        heads,
        rows,
        o_at: [into.layout.offset, sb, sh, sl],
        columns: [0, 0, 0, sd],
        minus_infinity: f32::NEG_INFINITY,
        sequences: cu_q.map_or([0; 2], |cu_q| cu_q.map(|cu_q| cu_q.len() as u32 - 1)),
        unused: 0,
    };
    let shader = Shader::new("combine")
        .with("F16", dtype == DType::F16)
        .with("O_TYPE", dtype.name())
        .with("VEC", if into.layout.aligned() { 4u32 } else { 1 })
        .with("HAS_LSE", lse.is_some())
        .with("RAGGED", cu_q.is_some());
    let [a, b] = parts;
    let mut bindings = vec![a.out, a.lse, b.out, b.lse, into.tensor];
    bindings.extend(lse);
    bindings.extend(cu_q.into_iter().flatten());
    recorder.dispatch(&shader, params, &bindings, u64::from(count).div_ceil(64))
}

/// Keys in pages that come before those of several sequences: a system prompt, the beginning of parallel samples.
#[derive(Clone, Copy, Debug)]
pub struct SharedKeys<'a> {
    /// The page of each stretch of each group's shared keys. u32 `[G, M]`
    pub pages: &'a Tensor,
    /// How many there are; for a sequence that shares none, a group of its own with 0. u32 `[G]`
    pub kv_len: &'a Tensor,
    /// Where each group's rows begin, and where the last one's end: the sequences of a group lie behind each other.
    /// u32 `[G + 1]`
    pub cu_q: &'a Tensor,
}

/// Records attention of sequences in pages of which some share their first keys: those are read once for a group's
/// rows, each sequence's own, which `tensors` describe, once for its own, and both are merged (cascade attention;
/// FlashInfer, Ye et al. 2024). Every row sees all shared keys.
///
/// # Errors
/// [`Error::Refused`] for tensors that are not ragged and in pages, and for what depends on where in the whole
/// a key stands: bias, mask, ALiBi, T5's buckets, offsets, prefixes, windows and functions; for weights as outputs; and
/// as [`record`].
pub fn record_cascade(
    recorder: &mut Recorder,
    tensors: &Tensors,
    shared: &SharedKeys,
    options: &Options,
) -> Result<[Plan; 2]> {
    for (name, given) in [
        ("bias", tensors.bias.is_some()),
        ("mask", tensors.mask.is_some()),
        ("alibi", tensors.alibi.is_some()),
        ("t5", tensors.t5.is_some()),
        ("q_offset", tensors.q_offset.is_some()),
        ("prefix_len", tensors.prefix_len.is_some()),
        ("weights", tensors.weights.is_some()),
        ("window", options.window != [None, None]),
        ("score_mod", options.score_mod.is_some()),
        ("mask_mod", options.mask_mod.is_some()),
        ("batch_invariant", options.batch_invariant),
    ] {
        if given {
            let bound = "not where keys are shared: it is of all keys together";
            return Err(Error::refused(name, "given", bound));
        }
    }
    let (Some(_), Some(cu_q)) = (tensors.pages, tensors.cu_q) else {
        let bound = "both given: shared keys are those of ragged sequences in pages";
        return Err(Error::refused("pages and cu_q", "absent", bound));
    };
    let gpu: &Gpu = recorder.gpu();
    let extents = tensors.out.extents();
    let [_, heads, rows, _] = extents;
    let part = || -> Result<[Tensor; 2]> {
        Ok([
            gpu.empty("partial out", DType::F32, &extents)?,
            gpu.empty("partial lse", DType::F32, &[1, heads, rows])?,
        ])
    };
    let [[before, before_lse], [own, own_lse]] = [part()?, part()?];
    let of_group = Tensors {
        out: View::bhld(&before)?,
        lse: Some(&before_lse),
        pages: Some(shared.pages),
        kv_len: Some(shared.kv_len),
        cu_q: Some(shared.cu_q),
        sinks: None,
        ..tensors.clone()
    };
    let all_seen = Options {
        causal: false,
        ..options.clone()
    };
    let of_sequence = Tensors {
        out: View::bhld(&own)?,
        lse: Some(&own_lse),
        ..tensors.clone()
    };
    let plans = [
        record(recorder, &of_group, &all_seen)?,
        record(recorder, &of_sequence, options)?,
    ];
    let parts = [(&before, &before_lse), (&own, &own_lse)];
    let parts = parts.map(|(out, lse)| Partial { out, lse });
    let ends = Some([shared.cu_q, cu_q]);
    merge_rows(recorder, parts, ends, &tensors.out, tensors.lse)?;
    Ok(plans)
}
