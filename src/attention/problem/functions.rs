//! The caller's own WGSL, checked before any kernel is made of it.

use std::error::Error as _;

use naga::{Block, Module, Statement};

use super::{Options, Tensors, refuse};
use crate::gpu::{is_reserved, wgsl_type};
use crate::{Error, Result};

/// Checks `score_mod` and `mask_mod`: that they compile beside the extra buffers, have the right
/// signature, and hold nothing that a kernel cannot bear: barriers, entry points, tensors, names of ours.
pub(super) fn check(tensors: &Tensors, options: &Options) -> Result<()> {
    let functions = [
        (
            "score_mod",
            &options.score_mod,
            "fn score_mod(score: f32, b: u32, h: u32, q: u32, k: u32) -> f32",
            "fn qkv_calls() -> f32 { return score_mod(0.0, 0u, 0u, 0u, 0u); }",
        ),
        (
            "mask_mod",
            &options.mask_mod,
            "fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool",
            "fn qkv_calls() -> bool { return mask_mod(0u, 0u, 0u, 0u); }",
        ),
    ];
    if !tensors.extra.is_empty() && functions.iter().all(|(_, text, ..)| text.is_none()) {
        return refuse(
            "extra",
            &tensors.extra.len(),
            "none without score_mod or mask_mod",
        );
    }
    // A declaration comes first, as in a kernel: directives are too late behind it.
    let mut declarations = String::from("const qkv_first = 0;\n");
    for (ix, (name, tensor)) in tensors.extra.iter().enumerate() {
        let letters = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let element = wgsl_type(tensor.dtype);
        let line =
            format!("@group(0) @binding({ix}) var<storage, read> {name}: array<{element}>;\n");
        let sound = !name.is_empty()
            && name.chars().all(letters)
            && !is_reserved(name)
            && naga::front::wgsl::parse_str(&line).is_ok();
        if !sound {
            return refuse(
                "an extra buffer's name",
                name,
                "a name of WGSL that no kernel uses",
            );
        }
        declarations += &line;
    }
    let mut names: Vec<String> = Vec::new();
    for (what, text, signature, call) in functions {
        let Some(text) = text else { continue };
        // Kernels' layouts are made from their lines, a comment's as well.
        if text.contains("@group") {
            return refuse(what, &"@group", "the extra buffers alone, in comments too");
        }
        let module = compile(what, text, signature, &declarations, call)?;
        if !module.entry_points.is_empty() {
            return refuse(what, &"an entry point", "functions alone");
        }
        if module.global_variables.len() > tensors.extra.len() {
            return refuse(what, &"a variable of the module", "the extra buffers alone");
        }
        if module
            .functions
            .iter()
            .any(|(_, function)| synchronises(&function.body))
        {
            return refuse(
                what,
                &"a barrier or subgroup operation",
                "plain functions of one element",
            );
        }
        for name in definitions(&module) {
            if is_reserved(&name) || names.contains(&name) {
                let bound = "names that neither a kernel nor the other function uses";
                return refuse(what, &name, bound);
            }
            names.push(name);
        }
    }
    Ok(())
}

/// Parses and validates a caller's text between declarations and a call; errors name the caller's line.
fn compile(
    what: &str,
    text: &str,
    signature: &str,
    declarations: &str,
    call: &str,
) -> Result<Module> {
    let source = format!("{declarations}{text}\n{call}\n");
    let refused = |line: Option<u32>, message: String| {
        let line = line.map_or(0, |line| line as usize);
        let line = line.saturating_sub(declarations.lines().count());
        match line > text.lines().count().max(1) {
            // The call itself does not fit.
            true => Error::refused(
                what,
                "another function",
                format!("`{signature}`: {message}"),
            ),
            false => Error::refused(what, format_args!("WGSL, line {line}"), message),
        }
    };
    let module = naga::front::wgsl::parse_str(&source).map_err(|e| {
        refused(
            e.location(&source).map(|at| at.line_number),
            e.message().into(),
        )
    })?;
    let mut validator = naga::valid::Validator::new(
        naga::valid::ValidationFlags::all(),
        naga::valid::Capabilities::empty(),
    );
    validator.validate(&module).map_err(|e| {
        let mut message = e.as_inner().to_string();
        let mut cause = e.as_inner().source();
        while let Some(inner) = cause {
            message += &format!(": {inner}");
            cause = inner.source();
        }
        refused(e.location(&source).map(|at| at.line_number), message)
    })?;
    Ok(module)
}

/// The names a caller's module defines, but for those put around it.
fn definitions(module: &Module) -> Vec<String> {
    let functions = module.functions.iter().filter_map(|(_, f)| f.name.clone());
    let types = module.types.iter().filter_map(|(_, t)| t.name.clone());
    let constants = module.constants.iter().filter_map(|(_, c)| c.name.clone());
    functions
        .chain(types)
        .chain(constants)
        .filter(|name| {
            !["qkv_first", "qkv_calls", "score_mod", "mask_mod"].contains(&name.as_str())
        })
        .collect()
}

/// Whether a block waits for other threads anywhere.
fn synchronises(block: &Block) -> bool {
    block.iter().any(|statement| match statement {
        Statement::ControlBarrier(_)
        | Statement::MemoryBarrier(_)
        | Statement::WorkGroupUniformLoad { .. }
        | Statement::SubgroupBallot { .. }
        | Statement::SubgroupGather { .. }
        | Statement::SubgroupCollectiveOperation { .. } => true,
        Statement::Block(block) => synchronises(block),
        Statement::If { accept, reject, .. } => synchronises(accept) || synchronises(reject),
        Statement::Switch { cases, .. } => cases.iter().any(|case| synchronises(&case.body)),
        Statement::Loop {
            body, continuing, ..
        } => synchronises(body) || synchronises(continuing),
        _ => false,
    })
}
