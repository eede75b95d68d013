//! Attention: a problem is checked, planned, and recorded into a caller's commands.
//!
//! ```text
//! Problem::new(tensors, options)? -> plan(problem, caps)? -> launches -> Recorder::dispatch
//! ```

mod plan;
mod problem;

pub use plan::{Launch, Plan, Route, plan};
pub use problem::{
    Align, Layout, MAX_HEAD_DIM, MAX_LEN, Options, Problem, Stage, T5, Tensors, View,
};

use crate::gpu::{DType, Recorder, Shader, Slice, Tensor};
use crate::{Error, Result};

/// Records one attention. Scratch that the plan needs is made here, once for the recording.
///
/// # Errors
/// [`Error::Refused`] for a problem that no kernel can honour.
pub fn record(recorder: &mut Recorder, tensors: &Tensors, options: &Options) -> Result<Plan> {
    let plan = plan(&Problem::new(tensors, options)?, recorder.gpu().caps())?;
    let scratch = match plan.scratch {
        0 => None,
        words => Some(
            recorder
                .gpu()
                .empty("attention scratch", DType::U32, &[words as u32])?,
        ),
    };
    record_plan(recorder, tensors, plan, scratch.as_ref())
}

/// [`record`] with scratch of the caller's: at least [`Plan::scratch`] words of 32 bits, which several
/// recordings may share if they run one after the other. Ask [`plan`] how many there must be.
///
/// # Errors
/// [`Error::Refused`] for a problem that no kernel can honour, and for too little scratch.
pub fn record_in(
    recorder: &mut Recorder,
    tensors: &Tensors,
    options: &Options,
    scratch: &Tensor,
) -> Result<Plan> {
    let plan = plan(&Problem::new(tensors, options)?, recorder.gpu().caps())?;
    if scratch.buffer().size() < plan.scratch * 4 {
        return Err(Error::refused(
            "scratch",
            format_args!("{} bytes", scratch.buffer().size()),
            format!("this problem takes {}", plan.scratch * 4),
        ));
    }
    record_plan(recorder, tensors, plan, Some(scratch))
}

fn record_plan(
    recorder: &mut Recorder,
    tensors: &Tensors,
    plan: Plan,
    scratch: Option<&Tensor>,
) -> Result<Plan> {
    let view = |view: &Option<View<'_>>| view.as_ref().map(|view| view.tensor.clone());
    // The user's weights hold the scores themselves unless another stage of them is wanted.
    let staged = plan
        .launches
        .iter()
        .any(|launch| launch.bindings.iter().any(|(name, _)| &**name == "stage"));
    let tensor = |name: &str| -> Option<Tensor> {
        match name {
            "q" => Some(tensors.q.tensor.clone()),
            "k" => Some(tensors.k.tensor.clone()),
            "v" => Some(tensors.v.tensor.clone()),
            "o" => Some(tensors.out.tensor.clone()),
            "weights" if staged => scratch.cloned(),
            "weights" => tensors.weights.or(scratch).cloned(),
            "stage" => tensors.weights.cloned(),
            "parts" | "block_map" | "tables" => scratch.cloned(),
            "lse" => tensors.lse.cloned(),
            "kv_len" => tensors.kv_len.cloned(),
            "q_offset" => tensors.q_offset.cloned(),
            "prefix_len" => tensors.prefix_len.cloned(),
            "cu_q" => tensors.cu_q.cloned(),
            "cu_k" => tensors.cu_k.cloned(),
            "rows" => tensors.rows.cloned(),
            "pages" => tensors.pages.cloned(),
            "bias" => view(&tensors.bias),
            "mask" => view(&tensors.mask),
            "alibi" => tensors.alibi.cloned(),
            "t5" => tensors.t5.cloned(),
            "sinks" => tensors.sinks.cloned(),
            extra => {
                let mut found = tensors.extra.iter();
                let found = found.find(|(name, _)| *name == extra);
                found.map(|&(_, tensor)| tensor.clone())
            }
        }
    };
    for launch in &plan.launches {
        let slices = launch
            .bindings
            .iter()
            .map(|(name, bytes)| Slice {
                tensor: tensor(name).expect("a plan binds what its problem has"),
                bytes: *bytes,
            })
            .collect();
        recorder.dispatch_slices(&launch.shader, launch.params, slices, launch.groups)?;
    }
    tracing::trace!(?plan, "attention");
    Ok(plan)
}

/// Partial results over different keys of the same rows.
#[derive(Clone, Copy, Debug)]
pub struct Partial<'a> {
    /// The result over these keys. f32 `[..., Dv]`
    pub out: &'a Tensor,
    /// The natural logarithm of each row's denominator; -inf where the part is empty. f32 `[...]`
    pub lse: &'a Tensor,
}

/// Records the merging of two partial results into `into`, which is as if their keys had been attended to
/// at once: for cascades, shared prefixes, and keys spread over devices (FlashInfer's merge of attention
/// states). More than two are merged one after the other; the order changes only the rounding. `into` needs
/// buffers of its own.
///
/// # Errors
/// [`Error::Refused`] where shapes or types do not agree.
pub fn merge(recorder: &mut Recorder, a: Partial, b: Partial, into: Partial) -> Result<()> {
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct Params {
        count: u32,
        value_dim: u32,
        minus_infinity: f32,
        unused: u32,
    }
    let shape = into.out.shape();
    for (name, part) in [("a", a), ("b", b), ("into", into)] {
        let rows = shape.split_last().map(|(_, rows)| rows);
        let agrees = part.out.shape() == shape
            && Some(part.lse.shape()) == rows
            && part.out.dtype() == DType::F32
            && part.lse.dtype() == DType::F32;
        if !agrees {
            return Err(Error::refused(
                format!("{name} of a merge"),
                format_args!("out {:?}, lse {:?}", part.out.shape(), part.lse.shape()),
                format!("f32, out {shape:?} and an lse for each of its rows"),
            ));
        }
    }
    for (name, tensor) in [("into.out", into.out), ("into.lse", into.lse)] {
        let inputs = [a.out, a.lse, b.out, b.lse];
        if inputs.iter().any(|input| input.buffer() == tensor.buffer())
            || into.out.buffer() == into.lse.buffer()
        {
            return Err(Error::refused(
                name,
                "in another's buffer",
                "a buffer of its own",
            ));
        }
    }
    if into.out.len() > u32::MAX as u64 {
        return Err(Error::refused(
            "into.out",
            format_args!("{shape:?}"),
            "fewer than 2^32 elements",
        ));
    }
    let params = Params {
        count: into.out.len() as u32,
        value_dim: shape.last().copied().unwrap_or(1).max(1),
        minus_infinity: f32::NEG_INFINITY,
        unused: 0,
    };
    recorder.dispatch(
        &Shader::new("combine"),
        params,
        &[a.out, a.lse, b.out, b.lse, into.out, into.lse],
        into.out.len().div_ceil(64),
    )
}
