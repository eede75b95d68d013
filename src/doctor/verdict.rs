//! What was found of a device's powers, and where that is remembered.

use std::path::{Path, PathBuf};

use super::{Check, Subject};
use crate::attention::Route;
use crate::gpu::{Caps, DType, Gpu, build, checksum, replace_file};

/// What is known of a power.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Finding {
    /// Nothing yet, or the device does not have it.
    #[default]
    Unknown,
    /// Its kernels gave right answers.
    Right,
    /// What was wrong.
    Wrong(String),
}

/// What is known of the powers that drivers get wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Subgroup operations.
    pub subgroups: Finding,
    /// `f16` in shaders and in storage.
    pub f16: Finding,
    /// Products in `f16`, of [`Options::f16_math`](crate::attention::Options::f16_math).
    pub f16_math: Finding,
    /// Cooperative matrices, which no plan uses unless they are known to be right.
    pub matrices: Finding,
}

impl Finding {
    fn of<'a>(checks: impl Iterator<Item = &'a Check>) -> Finding {
        let mut found = Finding::Unknown;
        for check in checks {
            match &check.outcome {
                Ok(_) => found = Finding::Right,
                Err(said) => {
                    // On one line, as it is remembered.
                    let said: Vec<&str> = said.split_whitespace().collect();
                    let said = said.join(" ");
                    return Finding::Wrong(format!("{}: {said}", check.subject));
                }
            }
        }
        found
    }

    fn is_wrong(&self) -> bool {
        matches!(self, Finding::Wrong(_))
    }

    fn line(&self) -> String {
        match self {
            Finding::Unknown => "unknown".into(),
            Finding::Right => "right".into(),
            Finding::Wrong(said) => format!("wrong {said}"),
        }
    }

    fn parse(line: &str) -> Option<Finding> {
        match line {
            "unknown" => Some(Finding::Unknown),
            "right" => Some(Finding::Right),
            line => Some(Finding::Wrong(line.strip_prefix("wrong ")?.into())),
        }
    }
}

impl Verdict {
    /// What follows from checks: `f16` is not to blame where subgroup operations are, and neither where
    /// matrices or products in `f16` are.
    pub(super) fn of(checks: &[Check]) -> Verdict {
        let is_f16 = |check: &Check| check.storage.contains(&DType::F16);
        let three_passes = |check: &Check| match check.subject {
            Subject::Attention { route, .. } => route == Route::ThreePass,
            Subject::Product => false,
        };
        let lanes = |check: &Check| check.subgroups && !three_passes(check);
        let subgroups = Finding::of(
            checks
                .iter()
                .filter(|&check| lanes(check) && !is_f16(check)),
        );
        let blameless = |check: &&Check| {
            is_f16(check) && !check.matrices && !(lanes(check) && subgroups.is_wrong())
        };
        let multiplies = |check: &Check| matches!(check.subject, Subject::Attention { f16_math, .. } if f16_math);
        let (products, others): (Vec<&Check>, Vec<&Check>) = checks
            .iter()
            .filter(blameless)
            .partition(|check| multiplies(check));
        Verdict {
            f16: Finding::of(others.into_iter()),
            f16_math: Finding::of(products.into_iter()),
            matrices: Finding::of(checks.iter().filter(|check| check.matrices)),
            subgroups,
        }
    }

    /// Whether each of these powers has been looked at.
    pub(super) fn covers(&self, caps: &Caps) -> bool {
        (caps.subgroups.is_none() || self.subgroups != Finding::Unknown)
            && (!caps.f16 || self.f16 != Finding::Unknown)
            && (!self.left(caps).f16_math || self.f16_math != Finding::Unknown)
            && (self.matrices != Finding::Unknown
                || self.left(caps).with_matrices().matrix_form().is_none())
    }

    /// The powers that are not wrong.
    pub(super) fn left(&self, caps: &Caps) -> Caps {
        let mut left = caps.clone();
        if self.subgroups.is_wrong() {
            left = left.without_subgroups();
        }
        if self.f16.is_wrong() {
            left = left.without_f16();
        }
        if self.f16_math.is_wrong() {
            left = left.without_f16_math();
        }
        if self.matrices.is_wrong() {
            left = left.without_matrices();
        }
        left
    }

    /// Tells of powers that are there and wrong.
    pub(super) fn warn(&self, caps: &Caps) {
        for (power, there, finding) in [
            (
                "kernels with subgroups",
                caps.subgroups.is_some(),
                &self.subgroups,
            ),
            ("kernels with f16", caps.f16, &self.f16),
            ("products in f16", caps.f16_math, &self.f16_math),
            (
                "cooperative matrices",
                !caps.cooperative.is_empty(),
                &self.matrices,
            ),
        ] {
            if let (true, Finding::Wrong(said)) = (there, finding) {
                tracing::warn!(
                    "{power} are not used on {}: {said}; `qkv doctor` looks again, and gives them back where all is right",
                    caps.name
                );
            }
        }
    }

    /// The device without the powers that are wrong, and with matrices that are right.
    pub(super) fn narrow(&self, gpu: &Gpu) -> Gpu {
        let caps = gpu.caps();
        let left = match self.matrices {
            Finding::Right => self.left(caps).with_matrices(),
            _ => self.left(caps).without_matrices(),
        };
        match left == *caps {
            true => gpu.clone(),
            false => gpu.confined(left),
        }
    }

    /// What was remembered of a device; none where the file is absent, damaged, or of another version of
    /// the crate, its shaders, the device or its driver.
    pub(super) fn recall(folder: &Path, identity: &str) -> Option<Verdict> {
        let header = header(identity);
        let text = std::fs::read_to_string(path(folder, &header)).ok()?;
        let mut lines = text.strip_prefix(&header)?.strip_suffix('\n')?.lines();
        let mut finding = |name| Finding::parse(lines.next()?.strip_prefix(name)?);
        let verdict = Verdict {
            subgroups: finding("subgroups ")?,
            f16: finding("f16 ")?,
            f16_math: finding("f16_math ")?,
            matrices: finding("matrices ")?,
        };
        lines.next().is_none().then_some(verdict)
    }

    /// Keeps it for the next start. A failure costs time there and nothing else.
    pub(super) fn remember(&self, folder: &Path, identity: &str) {
        let header = header(identity);
        let findings = [&self.subgroups, &self.f16, &self.f16_math, &self.matrices];
        let [subgroups, f16, f16_math, matrices] = findings.map(Finding::line);
        let text = format!(
            "{header}subgroups {subgroups}\nf16 {f16}\nf16_math {f16_math}\nmatrices {matrices}\n"
        );
        if let Err(e) = replace_file(&path(folder, &header), text.as_bytes()) {
            tracing::debug!("the verdict was not saved: {e}");
        }
    }
}

/// What a verdict holds for.
fn header(identity: &str) -> String {
    format!("{}{identity}", build())
}

fn path(folder: &Path, header: &str) -> PathBuf {
    folder.join(format!("verdict-{:016x}", checksum(header.as_bytes())))
}

/// Where the attempts at a verdict are kept.
pub(super) fn attempts_path(folder: &Path, identity: &str) -> PathBuf {
    path(folder, &header(identity)).with_extension("attempts")
}
