//! Attention inside somebody else's frame: their device, buffers, encoder and submission.
//!
//! ```text
//! cargo run --release --example own_device -- frame.png
//! ```
//!
//! One command encoder holds the host program's own compute pass, which makes queries and keys; the
//! attention; and the host program's own render pass, which draws the weights as a heat map straight from
//! their buffer. Nothing of `qkv` submits or waits, and the recording is encoded each frame anew without
//! making anything.

use qkv::attention::{Options, Tensors, View, plan, record_in};
use qkv::gpu::{DType, Gpu, Recorder, Tensor};
use qkv::{attention::Problem, wgpu};

const LEN: u32 = 96;
const DIM: u32 = 32;
const FRAMES: u32 = 3;
const SIZE: u32 = 512;

/// The host program's shaders: points on a spiral as queries and keys, and the picture.
const SHADERS: &str = "
@group(0) @binding(0) var<storage, read_write> points: array<f32>;
@group(0) @binding(1) var<uniform> time: vec4<f32>;
@compute @workgroup_size(64) fn fill(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= arrayLength(&points)) { return; }
    let row = f32(id.x / 32u);
    let column = f32(id.x % 32u);
    points[id.x] = sin(row * (0.02 + 0.01 * column) + time.x);
}

@group(0) @binding(0) var<storage, read> weights: array<f32>;
@vertex fn corner(@builtin(vertex_index) ix: u32) -> @builtin(position) vec4<f32> {
    return vec4<f32>(f32(ix % 2u) * 4.0 - 1.0, f32(ix / 2u) * 4.0 - 1.0, 0.0, 1.0);
}
@fragment fn heat(@builtin(position) at: vec4<f32>) -> @location(0) vec4<f32> {
    let cell = vec2<u32>(at.xy * (96.0 / 512.0));
    let w = sqrt(min(weights[cell.y * 96u + cell.x] * 12.0, 1.0));
    return vec4<f32>(w, w * w, 0.3 * (1.0 - w), 1.0);
}";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or("frame.png".into());

    // The host program's device, which knows nothing of us.
    let instance = wgpu::Instance::default();
    let adapter = pollster::block_on(instance.request_adapter(&Default::default()))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&Default::default()))?;

    // Its buffers. Ours are views into them.
    let storage = wgpu::BufferUsages::STORAGE;
    let buffer = |label, floats: u32, usage| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: u64::from(floats) * 4,
            usage,
            mapped_at_creation: false,
        })
    };
    let points = buffer("points", LEN * DIM, storage);
    let result = buffer("result", LEN * DIM, storage);
    let weights = buffer("weights", LEN * LEN, storage);
    let time = buffer(
        "time",
        4,
        wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
    );
    let gpu = Gpu::from_wgpu(&device, &queue);
    let shape = [1, 1, LEN, DIM];
    let input = Tensor::from_wgpu(points.clone(), DType::F32, &shape)?;
    let out = Tensor::from_wgpu(result, DType::F32, &shape)?;
    let map = Tensor::from_wgpu(weights.clone(), DType::F32, &[1, 1, LEN, LEN])?;
    let points_view = View::bhld(&input)?;
    let tensors = Tensors {
        weights: Some(&map),
        ..Tensors::new(
            points_view.clone(),
            points_view.clone(),
            points_view,
            View::bhld(&out)?,
        )
    };
    let options = Options {
        causal: true,
        ..Options::default()
    };
    // How much scratch that takes; the host program lends it.
    let needed = plan(&Problem::new(&tensors, &options)?, gpu.caps())?.scratch;
    let scratch = buffer("scratch", needed.max(1) as u32, storage);
    let scratch = Tensor::from_wgpu(scratch, DType::U32, &[needed.max(1) as u32])?;
    let mut recorder = Recorder::new(&gpu);
    let plan = record_in(&mut recorder, &tensors, &options, &scratch)?;
    let attention = recorder.finish()?;
    println!(
        "{:?}, {} dispatches, {needed} words of scratch",
        plan.route,
        attention.dispatches()
    );

    // The host program's passes.
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("host program"),
        source: wgpu::ShaderSource::Wgsl(SHADERS.into()),
    });
    let fill = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("fill"),
        layout: None,
        module: &module,
        entry_point: Some("fill"),
        compilation_options: Default::default(),
        cache: None,
    });
    let heat = device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
        label: Some("heat"),
        layout: None,
        vertex: wgpu::VertexState {
            module: &module,
            entry_point: Some("corner"),
            compilation_options: Default::default(),
            buffers: &[],
        },
        primitive: Default::default(),
        depth_stencil: None,
        multisample: Default::default(),
        fragment: Some(wgpu::FragmentState {
            module: &module,
            entry_point: Some("heat"),
            compilation_options: Default::default(),
            targets: &[Some(wgpu::TextureFormat::Rgba8Unorm.into())],
        }),
        multiview_mask: None,
        cache: None,
    });
    let bind = |layout: &wgpu::BindGroupLayout, buffers: &[&wgpu::Buffer]| {
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry {
                binding,
                resource: buffer.as_entire_binding(),
            })
            .collect();
        device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout,
            entries: &entries,
        })
    };
    let fill_group = bind(&fill.get_bind_group_layout(0), &[&points, &time]);
    let heat_group = bind(&heat.get_bind_group_layout(0), &[&weights]);
    let texture = device.create_texture(&wgpu::TextureDescriptor {
        label: Some("frame"),
        size: wgpu::Extent3d {
            width: SIZE,
            height: SIZE,
            depth_or_array_layers: 1,
        },
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format: wgpu::TextureFormat::Rgba8Unorm,
        usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
        view_formats: &[],
    });
    let view = texture.create_view(&Default::default());
    let read_back = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let frame = buffer("read back", SIZE * SIZE, read_back);

    let before = gpu.counters();
    for number in 0..FRAMES {
        queue.write_buffer(
            &time,
            0,
            bytemuck::cast_slice(&[number as f32, 0.0, 0.0, 0.0]),
        );
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&fill);
        pass.set_bind_group(0, &fill_group, &[]);
        pass.dispatch_workgroups((LEN * DIM).div_ceil(64), 1, 1);
        drop(pass);
        attention.encode(&mut encoder);
        let mut pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
            color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                view: &view,
                depth_slice: None,
                resolve_target: None,
                ops: Default::default(),
            })],
            ..Default::default()
        });
        pass.set_pipeline(&heat);
        pass.set_bind_group(0, &heat_group, &[]);
        pass.draw(0..3, 0..1);
        drop(pass);
        encoder.copy_texture_to_buffer(
            texture.as_image_copy(),
            wgpu::TexelCopyBufferInfo {
                buffer: &frame,
                layout: wgpu::TexelCopyBufferLayout {
                    offset: 0,
                    bytes_per_row: Some(SIZE * 4),
                    rows_per_image: None,
                },
            },
            texture.size(),
        );
        queue.submit([encoder.finish()]);
    }
    assert_eq!(gpu.counters(), before, "frames make nothing of ours");

    frame.map_async(wgpu::MapMode::Read, .., |mapped| {
        mapped.expect("the frame can be read")
    });
    device.poll(wgpu::PollType::wait_indefinitely())?;
    let pixels = frame.get_mapped_range(..)?.to_vec();
    image::save_buffer(&path, &pixels, SIZE, SIZE, image::ColorType::Rgba8)?;
    println!("{path}");
    Ok(())
}
