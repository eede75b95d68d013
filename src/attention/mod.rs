//! Attention: a problem is checked, planned, and recorded into a caller's commands.
//!
//! ```text
//! Problem::new(tensors, options)? -> plan(problem, caps)? -> launches -> Recorder::dispatch
//! ```

mod cascade;
mod plan;
mod problem;

pub use cascade::{Partial, SharedKeys, merge, record_cascade};
pub use plan::{Candidate, Launch, Plan, Route, Subgroups, plan, plan_with};
pub use problem::{
    Align, Layout, MAX_HEAD_DIM, MAX_LEN, Options, Problem, Stage, T5, Tensors, View,
};

use crate::gpu::{DType, Gpu, Recorder, Slice, Tensor};
use crate::{Error, Result};

/// The plan that [`record`] would make: what was tuned on this device ([`crate::tune`]) where it fits, else
/// by the table of capabilities.
///
/// # Errors
/// As [`plan()`].
pub fn planned_on(gpu: &Gpu, problem: &Problem) -> Result<Plan> {
    let tuned = || {
        // Text, then why.
        let choice = gpu.choice(&problem.bucket()?)?;
        choice.split(';').next()?.parse().ok()
    };
    let tuned = if gpu.has_no_choices() { None } else { tuned() };
    plan_with(problem, gpu.caps(), tuned)
}

/// Records one attention. Scratch that the plan needs is made here, once for the recording.
///
/// # Errors
/// [`Error::Refused`] for a problem that no kernel can honour.
pub fn record(recorder: &mut Recorder, tensors: &Tensors, options: &Options) -> Result<Plan> {
    let plan = planned_on(recorder.gpu(), &Problem::new(tensors, options)?)?;
    record_own(recorder, tensors, plan)
}

/// [`record`] by a candidate, to measure it.
///
/// # Errors
/// [`Error::Refused`] also for a candidate that does not fit the problem and the device.
pub fn record_as(
    recorder: &mut Recorder,
    tensors: &Tensors,
    options: &Options,
    candidate: Candidate,
) -> Result<Plan> {
    let problem = Problem::new(tensors, options)?;
    let plan = plan_with(&problem, recorder.gpu().caps(), Some(candidate))?;
    if !plan.tuned {
        let bound = "one that fits this problem and device";
        return Err(Error::refused("the candidate", candidate, bound));
    }
    record_own(recorder, tensors, plan)
}

fn record_own(recorder: &mut Recorder, tensors: &Tensors, plan: Plan) -> Result<Plan> {
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
/// recordings may share if they run one after the other. Ask [`plan()`] or [`planned_on`] how many there must
/// be; a tuned choice that needs more than there are is left. Its buffer is that of no other tensor.
///
/// # Errors
/// [`Error::Refused`] for a problem that no kernel can honour, for too little scratch, and for scratch in the buffer
/// of one of the tensors.
pub fn record_in(
    recorder: &mut Recorder,
    tensors: &Tensors,
    options: &Options,
    scratch: &Tensor,
) -> Result<Plan> {
    let problem = Problem::new(tensors, options)?;
    problem::check_scratch(tensors, scratch)?;
    let has = |plan: &Plan| scratch.bytes() >= plan.scratch * 4;
    let mut plan = planned_on(recorder.gpu(), &problem)?;
    if plan.tuned && !has(&plan) {
        plan = plan::plan(&problem, recorder.gpu().caps())?;
    }
    if !has(&plan) {
        return Err(Error::refused(
            "scratch",
            format_args!("{} bytes", scratch.bytes()),
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
    tracing::debug!(candidate = %plan.candidate, tuned = plan.tuned, "attention");
    tracing::trace!(?plan, "attention");
    Ok(plan)
}
