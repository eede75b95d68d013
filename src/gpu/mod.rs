//! The device: made here or lent by the caller, its powers, its kernels and its memory. `wgpu` is
//! spoken in this folder alone.

mod adapter;
pub mod blocks;
mod caps;
mod choices;
mod limits;
mod memory;
mod pipeline_cache;
mod recorder;
mod shader;
mod stats;
mod tensor;
mod timer;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use adapter::{AdapterReport, DEVICE_VARIABLE, adapters};
pub use caps::{Caps, CoopShape, Matrices};
pub(crate) use caps::{MATRIX_SUBGROUPS, MatrixForm};
pub use limits::{Limits, Rates, Stream};
pub(crate) use pipeline_cache::{checksum, replace_file};
pub(crate) use recorder::Slice;
pub use recorder::{Recorder, Recording};
pub(crate) use shader::is_reserved;
pub use shader::{Constant, Shader, templates};
pub use stats::Counters;
pub(crate) use tensor::wgsl_type;
pub use tensor::{DType, Tensor};

use crate::{Error, Result};
use stats::Stats;

/// The version of wgpu and naga that the manifest asks for, and no other: kernels load unchecked as naga translates
/// them, and what is remembered of their answers holds for that translation.
const WGPU: &str = "30.0.1";

/// What wrote the kernels that a remembered fact is of, a line each.
pub(crate) fn build() -> String {
    format!(
        "qkv {}\nshaders {:016x}\nwgpu {WGPU}\n",
        env!("CARGO_PKG_VERSION"),
        shader::fingerprint()
    )
}

/// A device with its compiled kernels. Cloning shares it.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    caps: Caps,
    templates: minijinja::Environment<'static>,
    pipelines: Mutex<HashMap<Shader, wgpu::ComputePipeline>>,
    cache: Option<Arc<pipeline_cache::DiskCache>>,
    choices: Arc<choices::Choices>,
    stats: Arc<Stats>,
    trouble: Arc<Mutex<Trouble>>,
}

/// What the device told out of turn.
#[derive(Default)]
struct Trouble {
    lost: Option<String>,
    errors: Vec<Error>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// A device with all the powers that its driver claims; `Gpu::choose` takes away those whose kernels
    /// were seen to be wrong.
    pub(crate) fn open(wanted: Option<&str>) -> Result<Gpu> {
        let (adapter, device, queue) = adapter::open(wanted)?;
        let info = adapter.get_info();
        let cooperative = adapter::cooperative(&adapter);
        let cache = pipeline_cache::DiskCache::open(&device, &info).map(Arc::new);
        let choices = choices::Choices::open(&info);
        let gpu = Gpu::assemble(device, queue, cooperative, cache, choices);
        let trouble = gpu.0.trouble.clone();
        gpu.0
            .device
            .set_device_lost_callback(move |reason, message| {
                lock(&trouble).lost = Some(format!("{reason:?}: {message}"));
            });
        let trouble = gpu.0.trouble.clone();
        gpu.0
            .device
            .on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
                tracing::error!("{error}");
                let message = error.to_string();
                lock(&trouble).errors.push(match error {
                    wgpu::Error::OutOfMemory { .. } => Error::OutOfMemory(message),
                    _ => Error::Device(message),
                });
            }));
        tracing::info!(adapter = info.name, driver = info.driver_info, "device");
        Ok(gpu)
    }

    /// An engine inside a device of the caller's, with the powers that the device was made with, but for
    /// cooperative matrices, whose shapes its adapter tells: see [`Gpu::from_wgpu_adapter`]. Its callbacks are
    /// left alone; recordings never submit or wait. It reads and writes no files: what is tuned on it is kept
    /// in memory.
    pub fn from_wgpu(device: &wgpu::Device, queue: &wgpu::Queue) -> Gpu {
        let choices = choices::Choices::default();
        Gpu::assemble(device.clone(), queue.clone(), Vec::new(), None, choices)
    }

    /// [`Gpu::from_wgpu`], and the cooperative matrices of the device's adapter, if the device was made with
    /// them; no plan uses them on it, but on what [`Gpu::self_tested`] makes of it where they are right.
    pub fn from_wgpu_adapter(
        adapter: &wgpu::Adapter,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
    ) -> Gpu {
        let cooperative = adapter::cooperative(adapter);
        let choices = choices::Choices::default();
        Gpu::assemble(device.clone(), queue.clone(), cooperative, None, choices)
    }

    /// The same device with other powers, of those that it has, and nothing compiled yet: the variants that
    /// lesser devices run. It takes over what was tuned so far, and keeps what is tuned on it to itself.
    pub fn narrowed(&self, caps: Caps) -> Gpu {
        self.with(caps, Arc::new(self.0.choices.copied()))
    }

    /// The same device with those of its powers that are right, for good: what is tuned on it is kept as it
    /// would be on the whole.
    pub(crate) fn confined(&self, caps: Caps) -> Gpu {
        self.with(caps, self.0.choices.clone())
    }

    fn with(&self, caps: Caps, choices: Arc<choices::Choices>) -> Gpu {
        let inner = &self.0;
        Gpu(Arc::new(Inner {
            device: inner.device.clone(),
            queue: inner.queue.clone(),
            caps,
            templates: inner.templates.clone(),
            pipelines: Mutex::default(),
            cache: inner.cache.clone(),
            choices,
            stats: Arc::default(),
            trouble: inner.trouble.clone(),
        }))
    }

    fn assemble(
        device: wgpu::Device,
        queue: wgpu::Queue,
        cooperative: Vec<CoopShape>,
        cache: Option<Arc<pipeline_cache::DiskCache>>,
        choices: choices::Choices,
    ) -> Gpu {
        Gpu(Arc::new(Inner {
            caps: Caps::new(
                device.adapter_info(),
                device.features(),
                device.limits(),
                cooperative,
            ),
            device,
            queue,
            templates: shader::templates(),
            pipelines: Mutex::default(),
            cache,
            choices: Arc::new(choices),
            stats: Arc::default(),
            trouble: Arc::default(),
        }))
    }

    /// The same device with `from` replaced by `to` in the text of a kernel: a wrong one to be found.
    #[cfg(test)]
    pub(crate) fn planted(&self, kernel: &'static str, from: &str, to: &str) -> Gpu {
        let mut templates = shader::templates();
        let name = format!("{kernel}.wgsl");
        let text = templates
            .get_template(&name)
            .expect("a kernel")
            .source()
            .to_string();
        assert!(text.contains(from), "{kernel} says no {from:?}");
        templates
            .add_template_owned(name, text.replace(from, to))
            .expect("a template");
        let gpu = self.narrowed(self.caps().clone());
        let mut inner = Arc::into_inner(gpu.0).expect("nobody else has it yet");
        inner.templates = templates;
        Gpu(Arc::new(inner))
    }

    /// Loses the device, as a driver does that starts anew.
    #[cfg(test)]
    pub(crate) fn lose(&self) {
        self.device().destroy();
        let _ = self.device().poll(wgpu::PollType::Poll);
        let told = self.alive();
        assert!(matches!(told, Err(Error::DeviceLost(_))), "{told:?}");
    }

    /// Adapter, driver and backend, a fact a line: what a verdict on the device holds for.
    pub(crate) fn identity(&self) -> String {
        let info = self.0.device.adapter_info();
        format!(
            "adapter {} {:x}:{:x}\ndriver {} {}\nbackend {}\n",
            info.name, info.vendor, info.device, info.driver, info.driver_info, info.backend
        )
    }

    /// What the device can do.
    pub fn caps(&self) -> &Caps {
        &self.0.caps
    }

    /// The device under the engine.
    pub fn device(&self) -> &wgpu::Device {
        &self.0.device
    }

    /// The queue under the engine.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.0.queue
    }

    /// What was made on the device so far.
    pub fn counters(&self) -> Counters {
        self.0.stats.snapshot()
    }

    pub(crate) fn count_bind_group(&self) {
        self.0
            .stats
            .bind_groups
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// The pipeline of a variant: compiled at its first use, then kept.
    pub(crate) fn pipeline(&self, shader: &Shader) -> Result<wgpu::ComputePipeline> {
        let inner = &self.0;
        if let Some(pipeline) = lock(&inner.pipelines).get(shader) {
            return Ok(pipeline.clone());
        }
        let text = shader.expand(&inner.templates)?;
        let layout = self.layout(&text);
        let started = std::time::Instant::now();
        let pipeline = self.checked(shader.kernel, || {
            let descriptor = wgpu::ShaderModuleDescriptor {
                label: Some(shader.kernel),
                source: wgpu::ShaderSource::Wgsl(text.into()),
            };
            let module = match shader.has_text() {
                // The caller's WGSL gets the checks of any other.
                true => inner.device.create_shader_module(descriptor),
                // SAFETY: the text is one of this crate's own kernels. Every kernel bounds its loops by
                // its parameters and guards each access by the tensors' extents or by clamping what it
                // reads; `Problem::new` and the ops have checked those extents against the buffers.
                // Canary and poison tests cover every variant. (`Recorder::dispatch` stays inside the
                // crate.)
                false => unsafe {
                    inner.device.create_shader_module_trusted(
                        descriptor,
                        wgpu::ShaderRuntimeChecks::unchecked(),
                    )
                },
            };
            inner
                .device
                .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                    label: Some(shader.kernel),
                    layout: Some(&layout),
                    module: &module,
                    entry_point: Some("main"),
                    compilation_options: wgpu::PipelineCompilationOptions {
                        zero_initialize_workgroup_memory: false,
                        ..Default::default()
                    },
                    cache: inner.cache.as_ref().map(|cache| cache.handle()),
                })
        })?;
        tracing::debug!(
            kernel = shader.kernel,
            ms = started.elapsed().as_secs_f64() * 1e3,
            "pipeline"
        );
        inner
            .stats
            .pipelines
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        lock(&inner.pipelines).insert(shader.clone(), pipeline.clone());
        Ok(pipeline)
    }

    /// The layout of the bindings that a kernel declares, a line each, whether it uses them or not.
    fn layout(&self, text: &str) -> wgpu::PipelineLayout {
        let bindings = text.lines().filter_map(|line| {
            let (binding, rest) = line
                .trim()
                .strip_prefix("@group(0) @binding(")?
                .split_once(") var<")?;
            let ty = match rest.split_once('>')?.0 {
                "uniform" => wgpu::BufferBindingType::Uniform,
                access => wgpu::BufferBindingType::Storage {
                    read_only: access == "storage, read",
                },
            };
            Some(wgpu::BindGroupLayoutEntry {
                binding: binding.parse().ok()?,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty,
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
        });
        let device = &self.0.device;
        let group = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: None,
            entries: &bindings.collect::<Vec<_>>(),
        });
        device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&group)],
            immediate_size: 0,
        })
    }

    /// Runs `make` and turns what the device says of it into an [`Error`].
    pub(crate) fn checked<T>(&self, what: &str, make: impl FnOnce() -> T) -> Result<T> {
        let device = &self.0.device;
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let made = make();
        let validation = pollster::block_on(validation.pop());
        let internal = pollster::block_on(internal.pop());
        let memory = pollster::block_on(memory.pop());
        if validation.is_some() || internal.is_some() {
            // A lost device is told by callbacks, which are heard while polling.
            let _ = device.poll(wgpu::PollType::Poll);
        }
        self.alive()?;
        if let Some(error) = memory {
            return Err(Error::OutOfMemory(format!("{what}: {error}")));
        }
        if let Some(error) = internal.or(validation) {
            return Err(Error::Device(format!("{what}: {error}")));
        }
        Ok(made)
    }

    /// An error if the device was lost or has refused a command since the last call.
    pub(crate) fn alive(&self) -> Result<()> {
        let mut trouble = lock(&self.0.trouble);
        if let Some(message) = &trouble.lost {
            return Err(Error::DeviceLost(message.clone()));
        }
        match std::mem::take(&mut trouble.errors).into_iter().next() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Submits one recording in an encoder of its own.
    pub(crate) fn submit(&self, recording: &Recording) -> Result<wgpu::SubmissionIndex> {
        let mut encoder = self.0.device.create_command_encoder(&Default::default());
        recording.encode(&mut encoder);
        self.submit_encoder(encoder)
    }

    fn submit_encoder(&self, encoder: wgpu::CommandEncoder) -> Result<wgpu::SubmissionIndex> {
        self.0
            .stats
            .submits
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // A buffer of the caller's may have been destroyed or mapped since it was recorded.
        self.checked("a submission", || self.0.queue.submit([encoder.finish()]))
    }

    /// Runs a recording and waits for its end.
    ///
    /// # Errors
    /// [`Error::Device`] for what the device refuses of it, such as a buffer that its owner destroyed or mapped.
    pub fn run(&self, recording: &Recording) -> Result<()> {
        let index = self.submit(recording)?;
        self.wait(index)
    }

    pub(crate) fn wait(&self, index: wgpu::SubmissionIndex) -> Result<()> {
        let waited = self.0.device.poll(wgpu::PollType::Wait {
            submission_index: Some(index),
            timeout: None,
        });
        // Work handed to a lost device counts as done; that it is lost is heard at the next look.
        let _ = self.0.device.poll(wgpu::PollType::Poll);
        self.alive()?;
        waited.map_err(|e| Error::DeviceLost(e.to_string()))?;
        Ok(())
    }

    /// Submits a recording that fills `staging`, waits, and hands the staging bytes to `read`.
    pub(crate) fn run_and_read<T>(
        &self,
        recording: &Recording,
        staging: &Tensor,
        read: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        let index = self.submit(recording)?;
        self.read_staging(index, staging, read)
    }

    /// Waits for the submission that fills `staging`, and hands the staging bytes to `read`.
    fn read_staging<T>(
        &self,
        index: wgpu::SubmissionIndex,
        staging: &Tensor,
        read: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        let (tell, told) = std::sync::mpsc::channel();
        staging
            .buffer()
            .slice(..)
            .map_async(wgpu::MapMode::Read, move |result| {
                let _ = tell.send(result);
            });
        self.wait(index)?;
        // Another thread's wait may have taken the callback on itself and not have called it yet.
        match told.recv() {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(Error::DeviceLost(e.to_string())),
            Err(_) => return Err(Error::DeviceLost("a buffer was not mapped".into())),
        }
        let view = staging
            .buffer()
            .get_mapped_range(..)
            .map_err(|e| Error::DeviceLost(e.to_string()))?;
        let value = read(&view);
        drop(view);
        staging.buffer().unmap();
        Ok(value)
    }

    /// Saves the driver's compiled kernels for the next start, where the backend can.
    pub fn save_pipelines(&self) {
        if let Some(cache) = &self.0.cache {
            cache.save();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{WGPU, build};

    #[test]
    fn the_manifest_asks_for_this_wgpu_and_naga_alone() {
        assert!(build().contains(&format!("wgpu {WGPU}\n")));
        let manifest = include_str!("../../Cargo.toml");
        for name in ["wgpu", "naga"] {
            let line = format!("{name} = {{ version = \"={WGPU}\",");
            assert!(manifest.lines().any(|own| own.starts_with(&line)), "{line}");
        }
    }
}
