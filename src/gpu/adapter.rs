//! Which adapters there are, which one is taken, and why.

use super::{Caps, CoopShape};
use crate::{Error, Result};

/// The environment variable that chooses a device, by number, or by a part of its name.
pub const DEVICE_VARIABLE: &str = "QKV_DEVICE";

/// One adapter of this machine, as `qkv devices` tells it.
#[derive(Clone, Debug)]
pub struct AdapterReport {
    /// Its number.
    pub number: usize,
    /// Its kind: discrete, integrated, virtual, software.
    pub kind: &'static str,
    /// Its backend.
    pub backend: String,
    /// Its driver.
    pub driver: String,
    /// What it can do.
    pub caps: Caps,
    /// Whether it would be taken, and why.
    pub chosen: Option<String>,
}

const NO_ADAPTER: &str = "no GPU adapter was found. On Linux, install a Vulkan driver (Debian, Ubuntu: \
    `apt-get install libvulkan1 mesa-vulkan-drivers` for the software one), or run the command through \
    `scripts/with-gpu`, which does that";

/// Every adapter, with the one that [`super::Gpu::choose`] would take marked.
pub fn adapters(wanted: Option<&str>) -> Result<Vec<AdapterReport>> {
    let found = enumerate();
    if found.is_empty() {
        return Err(Error::NoAdapter(NO_ADAPTER.into()));
    }
    let (chosen, why) = pick(&found, wanted)?;
    Ok(found
        .iter()
        .enumerate()
        .map(|(number, adapter)| {
            let info = adapter.get_info();
            AdapterReport {
                number,
                kind: kind(info.device_type),
                backend: info.backend.to_string(),
                driver: format!("{} {}", info.driver, info.driver_info)
                    .trim()
                    .to_string(),
                caps: Caps::new(
                    info,
                    adapter.features(),
                    adapter.limits(),
                    cooperative(adapter),
                ),
                chosen: (chosen == number).then(|| why.clone()),
            }
        })
        .collect())
}

fn enumerate() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    descriptor.backends &= wgpu::Backends::PRIMARY;
    let instance = wgpu::Instance::new(descriptor);
    pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY))
}

fn kind(kind: wgpu::DeviceType) -> &'static str {
    match kind {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    }
}

/// The adapter's index and the reason: the caller's wish, the environment's, or the fastest kind.
fn pick(found: &[wgpu::Adapter], wanted: Option<&str>) -> Result<(usize, String)> {
    let environment = std::env::var(DEVICE_VARIABLE)
        .ok()
        .filter(|value| !value.is_empty());
    let wish = match (wanted, &environment) {
        (Some(wanted), _) => Some((wanted, "--device")),
        (None, Some(value)) => Some((value.as_str(), DEVICE_VARIABLE)),
        (None, None) => None,
    };
    let Some((wish, by)) = wish else {
        let rank = |adapter: &wgpu::Adapter| match adapter.get_info().device_type {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        let best = (0..found.len())
            .min_by_key(|&ix| rank(&found[ix]))
            .unwrap_or(0);
        let kind = kind(found[best].get_info().device_type);
        let why = match found.len() {
            1 => "the only one".to_string(),
            _ => format!("the first of the fastest kind, {kind}"),
        };
        return Ok((best, why));
    };
    let chosen = match wish.parse::<usize>() {
        Ok(number) => Some(number).filter(|&ix| ix < found.len()),
        Err(_) => {
            let wish = wish.to_lowercase();
            let names = found
                .iter()
                .map(|adapter| adapter.get_info().name.to_lowercase());
            names
                .enumerate()
                .find(|(_, name)| name.contains(&wish))
                .map(|(ix, _)| ix)
        }
    };
    chosen
        .map(|ix| (ix, format!("chosen by {by}")))
        .ok_or_else(|| {
            let names: Vec<String> = found
                .iter()
                .enumerate()
                .map(|(ix, adapter)| format!("{ix} = {}", adapter.get_info().name))
                .collect();
            Error::NoAdapter(format!("{by} is {wish:?}: there is {}", names.join(", ")))
        })
}

pub(super) fn cooperative(adapter: &wgpu::Adapter) -> Vec<CoopShape> {
    adapter
        .cooperative_matrix_properties()
        .iter()
        .map(|shape| CoopShape {
            m: shape.m_size,
            n: shape.n_size,
            k: shape.k_size,
            ab: format!("{:?}", shape.ab_type).to_lowercase(),
            cr: format!("{:?}", shape.cr_type).to_lowercase(),
        })
        .collect()
}

/// Opens the chosen adapter with all of its limits and those of its features that kernels use.
pub(super) fn open(wanted: Option<&str>) -> Result<(wgpu::Adapter, wgpu::Device, wgpu::Queue)> {
    let found = enumerate();
    if found.is_empty() {
        return Err(Error::NoAdapter(NO_ADAPTER.into()));
    }
    let (ix, _) = pick(&found, wanted)?;
    let adapter = found[ix].clone();
    let useful = wgpu::Features::SHADER_F16
        | wgpu::Features::SUBGROUP
        | wgpu::Features::TIMESTAMP_QUERY
        | wgpu::Features::PIPELINE_CACHE
        | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let features = adapter.features() & useful;
    let matrices = features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
    let request = adapter.request_device(&wgpu::DeviceDescriptor {
        label: Some("qkv"),
        required_features: features,
        required_limits: adapter.limits(),
        experimental_features: match matrices {
            // SAFETY: the one such feature is cooperative matrices. Only `prefill_coop` and `matmul_coop` use
            // them: every index into their arrays is bounded by those arrays' sizes, whole subgroups reach
            // each operation, and they are taken for none but shapes that the adapter reports.
            true => unsafe { wgpu::ExperimentalFeatures::enabled() },
            false => wgpu::ExperimentalFeatures::disabled(),
        },
        memory_hints: wgpu::MemoryHints::Performance,
        trace: wgpu::Trace::Off,
    });
    let (device, queue) = pollster::block_on(request)
        .map_err(|e| Error::NoAdapter(format!("{}: {e}", adapter.get_info().name)))?;
    Ok((adapter, device, queue))
}
