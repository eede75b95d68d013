//! Whether a device's kernels give right answers, and what is not used of it where they do not.
//!
//! [`examine`] runs every route and variant that a device could choose on small hard problems, each beside the
//! oracle. Its short form runs once for each device and driver, when [`Gpu::choose`] first opens it, on the
//! kernels of powers that drivers have got wrong before: subgroup operations, `f16`, and cooperative matrices.
//! What it found is kept in the user's cache directory, and a power whose kernels were wrong is taken from
//! [`Gpu::caps`], so that no plan uses it; a warning says so. In a device of the caller's nothing is run
//! unasked, and its matrices are not used: [`Gpu::self_tested`] asks.

mod problems;
mod tolerance;
mod verdict;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use problems::Hard;
use problems::Prepared;
pub use tolerance::Tolerance;
pub use verdict::{Finding, Verdict};

use crate::attention::Route;
use crate::gpu::{Caps, DType, Gpu};
use crate::{Error, Result};

/// One problem on one route.
#[derive(Clone, Debug)]
pub struct Check {
    /// The problem.
    pub hard: Hard,
    /// How q and out, and k and v, are stored.
    pub storage: [DType; 2],
    /// The route.
    pub route: Route,
    /// The kernels that ran; none where it did not come to that.
    pub kernels: Vec<&'static str>,
    /// Whether kernels with subgroup operations were to be had.
    pub subgroups: bool,
    /// Whether the products were to be had on cooperative matrices.
    pub matrices: bool,
    /// The worst error in units of what is allowed, or what is wrong.
    pub outcome: std::result::Result<f64, String>,
    /// What it took, compilers included.
    pub time: Duration,
}

impl Check {
    fn new(gpu: &Gpu, prepared: &Prepared, route: Route) -> Result<Check> {
        let started = Instant::now();
        let (kernels, outcome) = match prepared.run(gpu, route) {
            Ok((plan, outcome)) => {
                let kernels = plan.launches.iter().map(|launch| launch.shader.kernel);
                (kernels.collect(), outcome)
            }
            // No word on the kernels.
            Err(error @ (Error::OutOfMemory(_) | Error::Refused { .. })) => return Err(error),
            Err(error) => (Vec::new(), Err(error.to_string())),
        };
        Ok(Check {
            hard: prepared.hard,
            storage: prepared.storage,
            route,
            kernels,
            subgroups: gpu.caps().subgroups.is_some(),
            matrices: route == Route::Prefill
                && prepared.storage == [DType::F16; 2]
                && gpu.caps().matrix_form().is_some(),
            outcome,
            time: started.elapsed(),
        })
    }
}

/// What [`examine`] found.
pub struct Report {
    /// The device, without the powers whose kernels are wrong.
    pub gpu: Gpu,
    /// What its driver claims.
    pub claimed: Caps,
    /// Every check.
    pub checks: Vec<Check>,
    /// What follows for the powers.
    pub verdict: Verdict,
}

/// How q and out, and k and v, are stored, and the problems that are run so. A variant takes a compiler up to
/// seconds, so each storage has those that differ by it.
const STORAGES: [([DType; 2], &[Hard]); 5] = [
    (
        [DType::F32; 2],
        &[
            Hard::Lengths,
            Hard::Loud,
            Hard::Odd,
            Hard::Masked,
            Hard::Parts,
        ],
    ),
    (
        [DType::F16; 2],
        &[Hard::Lengths, Hard::Loud, Hard::Odd, Hard::Wide],
    ),
    ([DType::BF16; 2], &[Hard::Lengths, Hard::Loud, Hard::Odd]),
    ([DType::F32, DType::Q8_0], &[Hard::Parts]),
    ([DType::F32, DType::Q4_0], &[Hard::Parts]),
];

/// Runs every route on every problem in every storage type, with subgroup operations and without, on the
/// device that [`Gpu::choose`] would take, and remembers the verdict. `see` hears of each check.
///
/// # Errors
/// [`Error::NoAdapter`], [`Error::OutOfMemory`] and [`Error::DeviceLost`]; a wrong answer is none.
pub fn examine(wanted: Option<&str>, see: &mut dyn FnMut(&Check)) -> Result<Report> {
    // By the table: what was tuned is another question.
    let opened = Gpu::open(wanted)?.untuned();
    let claimed = opened.caps().with_matrices();
    let gpu = opened.narrowed(claimed.clone());
    let all = (gpu.clone(), Route::ALL.as_slice());
    let fused = [Route::Prefill, Route::Decode];
    let mut checks = Vec::new();
    for (storage, problems) in STORAGES {
        let f16 = storage.contains(&DType::F16);
        if f16 && !claimed.f16 {
            continue;
        }
        // What stands in for a power is looked at where that power's kernels are; the three passes have none
        // to do without.
        let mut forms = vec![all.clone()];
        if storage == [DType::F32; 2] && claimed.subgroups.is_some() {
            forms.push((gpu.narrowed(claimed.without_subgroups()), &fused));
        }
        if f16 && claimed.matrix_form().is_some() {
            forms.push((gpu.narrowed(claimed.without_matrices()), &fused[..1]));
        }
        for &hard in problems {
            if hard == Hard::Wide && claimed.matrix_form().is_none() {
                continue;
            }
            let prepared = Prepared::new(&gpu, hard, storage)?;
            for (gpu, routes) in &forms {
                for &route in *routes {
                    let check = Check::new(gpu, &prepared, route)?;
                    see(&check);
                    checks.push(check);
                }
            }
        }
    }
    let verdict = Verdict::of(&checks);
    let identity = gpu.identity();
    if let Some(folder) = folder() {
        verdict.remember(&folder, &identity);
    }
    known().insert(identity, verdict.clone());
    Ok(Report {
        gpu: verdict.narrow(&opened),
        claimed,
        checks,
        verdict,
    })
}

/// What is known to go wrong on such a device and is kept from happening, a line each.
pub fn avoided(caps: &Caps) -> Vec<&'static str> {
    match caps.software {
        true => vec![
            "Mesa's software driver before 25 ends every loop, without a word, once a thread has taken 65,535 \
             turns in all: plans keep threads below that, and refuse what cannot be cut",
            "it unrolls loops of known length and loops over arrays of at most 32 elements, and compiles for \
             seconds: kernels hide their lengths",
        ],
        false => Vec::new(),
    }
}

/// The short form: each power's kernels on two problems that share their variants, few and small ones, as
/// this is somebody's first start.
fn judge(gpu: &Gpu, verdict: &mut Verdict) -> Result<()> {
    let run = |gpu: &Gpu, dtype, problems: [Hard; 2], routes: &[Route]| -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        for hard in problems {
            let prepared = Prepared::new(gpu, hard, [dtype; 2])?;
            for &route in routes {
                checks.push(Check::new(gpu, &prepared, route)?);
                // One is enough, and may have cost the device.
                if checks.last().is_some_and(|check| check.outcome.is_err()) {
                    return Ok(checks);
                }
            }
        }
        Ok(checks)
    };
    let claimed = gpu.caps();
    let small = [Hard::Lengths, Hard::Loud];
    if claimed.subgroups.is_some() && verdict.subgroups == Finding::Unknown {
        let gpu = gpu.narrowed(claimed.without_f16()).untuned();
        let checks = run(&gpu, DType::F32, small, &[Route::Prefill, Route::Decode])?;
        verdict.subgroups = Verdict::of(&checks).subgroups;
        gpu.alive()?;
    }
    if claimed.f16 && verdict.f16 == Finding::Unknown {
        let gpu = gpu.narrowed(verdict.left(claimed)).untuned();
        // What loads and stores it is the same text in every fused kernel.
        let checks = run(&gpu, DType::F16, small, &[Route::ThreePass, Route::Decode])?;
        verdict.f16 = Verdict::of(&checks).f16;
        gpu.alive()?;
    }
    let left = verdict.left(claimed).with_matrices();
    if left.matrix_form().is_some() && verdict.matrices == Finding::Unknown {
        let gpu = gpu.narrowed(left).untuned();
        let checks = run(
            &gpu,
            DType::F16,
            [Hard::Wide, Hard::Loud],
            &[Route::Prefill],
        )?;
        verdict.matrices = Verdict::of(&checks).matrices;
    }
    Ok(())
}

/// What is known of the device: remembered, or else found now and remembered.
fn consult(gpu: &Gpu, folder: Option<&Path>) -> Verdict {
    let identity = gpu.identity();
    let remembered = folder.and_then(|folder| Verdict::recall(folder, &identity));
    let mut verdict = remembered.unwrap_or_default();
    let before = verdict.clone();
    let started = Instant::now();
    if let Err(error) = judge(gpu, &mut verdict) {
        tracing::debug!("the device was not examined to the end: {error}");
    }
    if verdict != before {
        tracing::debug!(
            ms = started.elapsed().as_secs_f64() * 1e3,
            ?verdict,
            "examined"
        );
        if let Some(folder) = folder {
            verdict.remember(folder, &identity);
        }
    }
    verdict
}

/// Where verdicts are kept.
fn folder() -> Option<PathBuf> {
    Some(dirs::cache_dir()?.join("qkv"))
}

/// Verdicts of this process by device, so that without a cache directory too each is examined once.
fn known() -> MutexGuard<'static, BTreeMap<String, Verdict>> {
    static KNOWN: Mutex<BTreeMap<String, Verdict>> = Mutex::new(BTreeMap::new());
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The verdict on a device, of which the file is asked once a process. Threads that ask at once wait for the
/// first.
fn verdict(gpu: &Gpu) -> Verdict {
    let mut known = known();
    let identity = gpu.identity();
    let verdict = known.get(&identity).cloned().unwrap_or_default();
    if verdict.covers(gpu.caps()) {
        return verdict;
    }
    let verdict = consult(gpu, folder().as_deref());
    known.insert(identity, verdict.clone());
    verdict
}

impl Gpu {
    /// The best device of this machine, or the one the environment names (see
    /// [`crate::gpu::DEVICE_VARIABLE`]), as [`Gpu::choose`] opens it.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none.
    pub fn new() -> Result<Gpu> {
        Gpu::choose(None)
    }

    /// A device by number or by a part of its name, as `qkv devices` lists them; `None` takes the best.
    /// At a device's first use with its driver some of its kernels are [examined](crate::doctor), which takes
    /// a second or so; powers whose kernels were wrong are not used.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none, or none of that number or name.
    pub fn choose(wanted: Option<&str>) -> Result<Gpu> {
        let mut gpu = Gpu::open(wanted)?;
        let mut found = verdict(&gpu);
        // A wrong kernel may cost the device: the next one does without it, and so on for each power.
        for _ in 0..3 {
            if gpu.alive().is_ok() {
                break;
            }
            gpu = Gpu::open(wanted)?;
            found = verdict(&gpu);
        }
        Ok(found.narrow(&gpu))
    }

    /// The same device without those powers whose kernels give wrong answers on it, for devices of the
    /// caller's: what [`Gpu::choose`] does with its own. Submits and waits, unless the answer is remembered.
    pub fn self_tested(&self) -> Gpu {
        verdict(self).narrow(self)
    }
}

#[cfg(test)]
mod tests;
