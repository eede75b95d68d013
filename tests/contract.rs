//! What an embedder may rely on: their device and encoder, nothing submitted or allocated behind their
//! back, errors instead of panics.

use qkv::attention::{self, Options, Tensors, View};
use qkv::gpu::{DType, Gpu, Recorder, Tensor};
use qkv::{Error, wgpu};

fn problem(gpu: &Gpu) -> [Tensor; 4] {
    let shape = [1, 2, 5, 8];
    let values: Vec<f32> = (0..80).map(|ix| (ix as f32 * 0.37).sin()).collect();
    let upload = |name| {
        gpu.upload_floats(name, DType::F32, &shape, &values)
            .unwrap()
    };
    let out = gpu.empty("out", DType::F32, &shape).unwrap();
    [upload("q"), upload("k"), upload("v"), out]
}

fn record(recorder: &mut Recorder, [q, k, v, out]: &[Tensor; 4]) {
    let tensors = Tensors::new(
        View::bhld(q).unwrap(),
        View::bhld(k).unwrap(),
        View::bhld(v).unwrap(),
        View::bhld(out).unwrap(),
    );
    attention::record(recorder, &tensors, &Options::default()).unwrap();
}

#[test]
fn a_recording_goes_into_a_callers_encoder_and_is_neither_submitted_nor_made_anew() {
    let own = Gpu::new().unwrap().untuned();
    let gpu = Gpu::from_wgpu(own.device(), own.queue());
    let tensors = problem(&gpu);
    let mut recorder = Recorder::new(&gpu);
    record(&mut recorder, &tensors);
    let recording = recorder.finish().unwrap();
    assert_eq!(recording.dispatches(), 1);

    let before = gpu.counters();
    assert_eq!((before.submits, before.pipelines), (0, 1));
    for _ in 0..3 {
        let mut encoder = own.device().create_command_encoder(&Default::default());
        encoder.clear_buffer(tensors[3].buffer(), 0, None);
        recording.encode(&mut encoder);
        own.queue().submit([encoder.finish()]);
    }
    assert_eq!(gpu.counters(), before);
    let out = gpu.read_floats(&tensors[3]).unwrap();
    assert!(out.iter().all(|value| value.is_finite()) && out.iter().any(|&value| value != 0.0));
}

#[test]
fn a_variant_is_compiled_once() {
    let gpu = Gpu::new().unwrap().untuned();
    let tensors = problem(&gpu);
    for _ in 0..3 {
        let mut recorder = Recorder::new(&gpu);
        record(&mut recorder, &tensors);
        gpu.run(&recorder.finish().unwrap()).unwrap();
    }
    assert_eq!(gpu.counters().pipelines, 1);
}

#[test]
fn a_lost_device_is_an_error_and_no_panic() {
    let gpu = Gpu::new().unwrap().untuned();
    let tensors = problem(&gpu);
    let mut recorder = Recorder::new(&gpu);
    record(&mut recorder, &tensors);
    let recording = recorder.finish().unwrap();
    gpu.device().destroy();
    let lost =
        |error: Option<Error>| assert!(matches!(error, Some(Error::DeviceLost(_))), "{error:?}");
    lost(gpu.run(&recording).err());
    lost(gpu.empty("more", DType::F32, &[4]).err());
    lost(gpu.read(&tensors[3]).err());
}

#[test]
fn more_memory_than_there_is_is_an_error_that_names_the_bytes() {
    let gpu = Gpu::new().unwrap().untuned();
    let bytes = gpu.caps().max_buffer + 16;
    let rows = u32::try_from(bytes.div_ceil(4096)).unwrap();
    let error = gpu
        .empty("too much", DType::F32, &[rows, 1024])
        .unwrap_err();
    assert!(matches!(error, Error::OutOfMemory(_)), "{error:?}");
    assert!(error.to_string().contains("too much"), "{error}");
    // The device still works.
    let tensors = problem(&gpu);
    let mut recorder = Recorder::new(&gpu);
    record(&mut recorder, &tensors);
    gpu.run(&recorder.finish().unwrap()).unwrap();
}

#[test]
fn bytes_are_counted_up_and_down() {
    let gpu = Gpu::new().unwrap().untuned();
    let tensor = gpu.empty("a", DType::F32, &[1000]).unwrap();
    assert_eq!(gpu.counters().bytes, 4000);
    drop(tensor);
    let after = gpu.counters();
    assert_eq!((after.bytes, after.peak_bytes), (0, 4000));
}

#[test]
fn a_buffer_that_is_too_small_for_its_shape_is_refused() {
    let gpu = Gpu::new().unwrap().untuned();
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 64,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let error = Tensor::from_wgpu(buffer, DType::F32, &[5, 4]).unwrap_err();
    assert!(
        matches!(error, Error::Refused { .. }) && error.to_string().contains("80 bytes"),
        "{error}"
    );
}

/// A buffer of a caller's.
fn buffer(gpu: &Gpu, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size,
        usage,
        mapped_at_creation: false,
    })
}

/// The argument that was refused, and the whole refusal.
fn refused<T>(result: qkv::Result<T>) -> (String, String) {
    match result.map(drop).unwrap_err() {
        ref error @ Error::Refused { ref argument, .. } => (argument.clone(), error.to_string()),
        error => panic!("{error}"),
    }
}

#[test]
fn buffers_that_cannot_be_copied_are_refused_where_nobody_hears_the_devices_errors() {
    let own = Gpu::new().unwrap().untuned();
    // A device whose uncaught errors panic, as it came from wgpu.
    own.device()
        .on_uncaptured_error(std::sync::Arc::new(|error| panic!("{error}")));
    let gpu = Gpu::from_wgpu(own.device(), own.queue());
    let storage = wgpu::BufferUsages::STORAGE;
    let tensor = |usage| Tensor::from_wgpu(buffer(&gpu, 16, usage), DType::F32, &[4]).unwrap();
    let plain = tensor(storage);
    let (argument, error) = refused(gpu.write(&plain, &[0; 16]));
    assert_eq!(argument, "what is written to");
    assert!(error.contains("COPY_DST"), "{error}");
    let (argument, error) = refused(gpu.read(&plain));
    assert_eq!(argument, "what is read");
    assert!(error.contains("COPY_SRC"), "{error}");
    let both = tensor(storage | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST);
    gpu.write(&both, &[7; 16]).unwrap();
    assert_eq!(gpu.read(&both).unwrap(), [7; 16]);
    // What no look at a buffer tells.
    let tensors = problem(&gpu);
    let mut recorder = Recorder::new(&gpu);
    record(&mut recorder, &tensors);
    let recording = recorder.finish().unwrap();
    gpu.run(&recording).unwrap();
    for tensor in [&tensors[1], &both] {
        tensor.buffer().destroy();
    }
    let device =
        |error: Option<Error>| assert!(matches!(error, Some(Error::Device(_))), "{error:?}");
    device(gpu.run(&recording).err());
    device(gpu.read(&both).err());
    device(gpu.write(&both, &[7; 16]).err());
}

#[test]
fn buffers_that_do_not_hold_their_shape_in_whole_words_are_refused() {
    let gpu = Gpu::new().unwrap().untuned();
    let storage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    for (dtype, n, size) in [
        (DType::F16, 3, 6),
        (DType::Bool, 3, 3),
        (DType::BF16, 1, 3),
        (DType::F32, 0, 0),
    ] {
        let made = |size| Tensor::from_wgpu(buffer(&gpu, size, storage), dtype, &[n]);
        let (argument, error) = refused(made(size));
        assert_eq!(argument, "buffer");
        let need = dtype.bytes(&[n]).max(1).next_multiple_of(4);
        assert!(error.contains(&format!("needs {need} bytes")), "{error}");
        let whole = made(need).unwrap();
        assert_eq!(gpu.read(&whole).unwrap().len() as u64, dtype.bytes(&[n]));
    }
}

/// A device with WebGPU's default limits and no optional feature, as a browser grants it.
fn least_device() -> (wgpu::Device, wgpu::Queue) {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    descriptor.backends = wgpu::Backends::PRIMARY;
    let instance = wgpu::Instance::new(descriptor);
    let adapter = pollster::block_on(instance.request_adapter(&Default::default())).unwrap();
    let request = adapter.request_device(&wgpu::DeviceDescriptor::default());
    pollster::block_on(request).unwrap()
}

#[test]
#[cfg(feature = "models")]
fn a_device_with_default_limits_and_no_features_translates_the_same() {
    use qkv::generate::{Generator, Settings};
    use qkv::model::{Model, Padded, Source};

    let goldens = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/relu");
    let source = Source::Directory(goldens.into());
    let write = |gpu: &Gpu, beams| {
        let model = Model::load(gpu, &source, DType::F32, &mut |_, _| {}).unwrap();
        let sources = Padded::new(&[vec![5, 9, 31, 7, 0], vec![12, 0]], 0);
        let memory = model.encode(&sources, true).unwrap();
        let settings = Settings {
            beams,
            max_tokens: 12,
            ..Settings::load(&source).unwrap()
        };
        let mut generator = Generator::new(&model, &memory, &settings).unwrap();
        generator.by_ref().for_each(|step| drop(step.unwrap()));
        let sequences = generator.sequences().into_iter();
        sequences
            .map(|sequence| sequence.tokens)
            .collect::<Vec<_>>()
    };
    let (device, queue) = least_device();
    let least = Gpu::from_wgpu(&device, &queue);
    assert!(!least.caps().f16);
    assert_eq!(least.caps().workgroup_memory, 16 << 10);
    assert_eq!(least.caps().storage_buffers, 8);
    let full = Gpu::new().unwrap().untuned();
    for beams in [1, 4] {
        assert_eq!(write(&least, beams), write(&full, beams));
    }
    let f16 = least
        .upload_floats("half", DType::F16, &[1, 1, 1, 4], &[1.0; 4])
        .unwrap();
    let out = least.empty("out", DType::F16, &[1, 1, 1, 4]).unwrap();
    let tensors = Tensors::new(
        View::bhld(&f16).unwrap(),
        View::bhld(&f16).unwrap(),
        View::bhld(&f16).unwrap(),
        View::bhld(&out).unwrap(),
    );
    let refused = attention::record(&mut Recorder::new(&least), &tensors, &Options::default());
    assert!(refused.unwrap_err().to_string().contains("f16"));
}

#[test]
#[cfg(feature = "models")]
fn a_device_with_default_limits_and_no_features_goes_on_with_a_text_the_same() {
    use qkv::generate::{CausalGenerator, CausalSettings};
    use qkv::model::{CausalModel, Source};

    let write = |gpu: &Gpu, name: &str| {
        let goldens = format!("{}/tests/goldens/causal/{name}", env!("CARGO_MANIFEST_DIR"));
        let source = Source::Directory(goldens.into());
        let model = CausalModel::load(gpu, &source, DType::F32, &mut |_, _| {}).unwrap();
        let settings = CausalSettings::greedy(8, Vec::new());
        let prompts = [vec![5, 9, 31, 7, 0], vec![12]];
        let mut generator = CausalGenerator::new(&model, &prompts, &settings).unwrap();
        generator.by_ref().for_each(|step| drop(step.unwrap()));
        let sequences = generator.sequences().to_vec();
        sequences
            .into_iter()
            .map(|sequence| sequence.tokens)
            .collect::<Vec<_>>()
    };
    let (device, queue) = least_device();
    let (least, full) = (
        Gpu::from_wgpu(&device, &queue),
        Gpu::new().unwrap().untuned(),
    );
    for name in ["mistral", "qwen3"] {
        assert_eq!(write(&least, name), write(&full, name));
    }
}
