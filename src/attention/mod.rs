//! Attention: a problem is checked, planned, and recorded into a caller's commands.
//!
//! ```text
//! Problem::new(tensors, options)? -> plan(problem, caps)? -> launches -> Recorder::dispatch
//! ```

mod plan;
mod problem;

pub use plan::{Launch, Plan, Route, plan};
pub use problem::{Align, Layout, MAX_HEAD_DIM, Options, Problem, Tensors, View};

use crate::Result;
use crate::gpu::{DType, Recorder, Tensor};

/// Records one attention. Scratch that the plan needs is made here, once for the recording.
///
/// # Errors
/// [`crate::Error::Refused`] for a problem that no kernel can honour.
pub fn record(recorder: &mut Recorder, tensors: &Tensors, options: &Options) -> Result<Plan> {
    let problem = Problem::new(tensors, options)?;
    let plan = plan(&problem, recorder.gpu().caps())?;
    let params = problem.params(plan.splits, plan.split_len);
    let scratch = match plan.scratch {
        0 => None,
        elements => Some(recorder.gpu().empty(
            "attention scratch",
            DType::F32,
            &[elements as u32],
        )?),
    };
    let kv_len: Vec<&Tensor> = tensors.kv_len.into_iter().collect();
    let masks: Vec<&Tensor> = tensors.kv_len.into_iter().chain(tensors.rows).collect();
    let (q, k, v, out) = (
        tensors.q.tensor,
        tensors.k.tensor,
        tensors.v.tensor,
        tensors.out.tensor,
    );
    let bind = |buffers: &[&Tensor], optional: &[&Tensor]| -> Vec<Tensor> {
        buffers
            .iter()
            .chain(optional)
            .map(|&tensor| tensor.clone())
            .collect()
    };
    let bindings: Vec<Vec<Tensor>> = match (plan.route, &scratch) {
        (Route::ThreePass, _) => {
            let weights = tensors
                .weights
                .or(scratch.as_ref())
                .expect("planned: weights or scratch");
            vec![
                bind(&[q, k, weights], &masks),
                bind(&[weights], &kv_len),
                bind(&[weights, v, out], &masks),
            ]
        }
        (Route::Decode, Some(parts)) => {
            vec![bind(&[q, k, v, parts], &masks), bind(&[parts, out], &[])]
        }
        (Route::Prefill | Route::Decode, _) => vec![bind(&[q, k, v, out], &masks)],
    };
    for (launch, bindings) in plan.launches.iter().zip(&bindings) {
        let bindings: Vec<&Tensor> = bindings.iter().collect();
        recorder.dispatch(&launch.shader, params, &bindings, launch.groups)?;
    }
    tracing::trace!(?plan, "attention");
    Ok(plan)
}
