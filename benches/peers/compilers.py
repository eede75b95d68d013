#!/usr/bin/env python3
"""What the compilers of GPUs make of attention kernels, ours beside the peers', as Markdown tables.

    compilers.py --tool COMMAND FOLDER > tables.md
    compilers.py --tool COMMAND --spills FOLDER

COMMAND is called as `COMMAND GPU FILE --json` and `COMMAND GPU FILE --disasm`: it compiles a WGSL or SPIR-V
file for that GPU, none needed, and prints what the driver's VK_KHR_pipeline_executable_properties say, and
with them the assembly. FOLDER has a folder for each side, with files KERNEL-TYPE-DIM[-LANES].wgsl or .spv:
prefill-f16-128-8-32.wgsl, products KERNEL-WEIGHTS-ROWS.wgsl with the rows of a thread; LANES, where the text hangs on the subgroups, is 64 (AMD) or 8-32 (Intel). A
kernel of several launches has one file each, told apart in brackets: "decode-f32-64 (QK).spv"; "(matrices)" is
for navi31 alone, which has cooperative matrices. Ours come from

    QKV_TEXTS=FOLDER/qkv cargo test --release --test shaders -- --ignored texts_for_compilers

With --spills, FOLDER has a folder for each GPU, with everything that is planned there, and what spills or uses
scratch is named; with --every N, one in N is looked at:

    QKV_TEXTS=FOLDER cargo test --release --test shaders -- --ignored texts_of_gpus_for_compilers

Cycles per 64 multiply-adds are the compiler's own estimate for the whole kernel over the multiply-adds that the
same guesses give. The compilers guess how often loops turn: Intel's 10 times; AMD's 8 times, an inner loop 4
times, one further in twice, a branch that all lanes agree on is taken half the time and another one three quarters.
A multiply-add is a multiplication of floats in the assembly, fused or not (two in packed instructions and in
dot products of pairs), times the lanes that execute it; in products the scaling of blocks counts as well. So the figures compare kernels; they are no times.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

GPUS = {"navi21": "64", "navi31": "64", "vega10": "64", "dg2": "8-32"}
ROWS = {"navi21": 8, "navi31": 8, "vega10": 4, "dg2": 4}


def call(tool, gpu, file, flag):
    return subprocess.run([*tool, gpu, file, flag], check=True, capture_output=True, text=True).stdout


def for_naga(path):
    """The text without what naga needs not and does not know."""
    return re.sub(r"^\s*(enable subgroups|diagnostic\(.*\));", "", path.read_text(), flags=re.M)


def amd_multiplications(assembly, lanes):
    """Of one lane, weighed as the compiler weighs its cycles."""
    lines, labels = [], {}
    for line in assembly.splitlines():
        if label := re.match(r"(BB\d+):", line):
            labels[label[1]] = len(lines)
        elif line.startswith("\t"):
            lines.append(line.split(";")[0].strip())
    jumps = [(at, re.match(r"s_(c?branch)\S*\s+(BB\d+)", line)) for at, line in enumerate(lines)]
    jumps = [(at, jump[1], labels[jump[2]], "exec" in lines[at]) for at, jump in jumps if jump]
    loops = [(to, at) for at, _, to, _ in jumps if to <= at]
    # Several jumps back to one label are one loop.
    ifs = []
    loops = [(to, max(end for start, end in loops if start == to)) for to in {start for start, _ in loops}]
    within = lambda at: sorted(loop for loop in loops if loop[0] <= at <= loop[1])
    for at, kind, to, divergent in jumps:
        leaves = any(to > end for _, end in within(at))
        if to > at and not leaves:
            ifs.append((at, to, 0.75 if divergent else 0.5))
    total = 0.0
    for at, line in enumerate(lines):
        # Two in one line where they are issued together.
        count = 0
        for word in re.findall(r"v_\w+", line):
            if re.match(r"v_(dual_)?(fma|fmac|fmamk|fmaak|mad|mac|madmk|madak|mul)_(mix_|legacy_)?(f32|f16|mixlo|mixhi)", word):
                count += 1
            elif re.match(r"v_fma_mix(lo|hi)?_", word):
                count += 1
            elif re.match(r"v_pk_(fma|mul)_f16|v_(dual_)?dot2", word):
                count += 2
            elif shape := re.match(r"v_wmma_f32_(\d+)x(\d+)x(\d+)", word):
                # Of the whole subgroup.
                count += int(shape[1]) * int(shape[2]) * int(shape[3]) / lanes
        if count:
            weight = 1.0
            for depth in range(len(within(at))):
                weight *= [8, 4][depth] if depth < 2 else 2
            for start, end, share in ifs:
                if start < at < end:
                    weight *= share
            total += weight * count
    return total


def intel_multiplications(assembly):
    """Of all lanes of a thread, weighed as the compiler weighs its cycles."""
    lines = assembly.splitlines()
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"LABEL\d+:", line)}
    loops = []
    for at, line in enumerate(lines):
        if jump := re.match(r"(?:\(.*?\) )?while\(\d+\)\s+JIP:\s+(LABEL\d+)", line):
            loops.append((labels[jump[1]], at))
    total = 0.0
    for at, line in enumerate(lines):
        if found := re.match(r"(?:\(.*?\) )?(?:mad|mac|mul)(?:\.\w+)*\((\d+)\)\s+\S+?>?(F|HF)\s", line):
            total += int(found[1]) * 10.0 ** sum(start <= at <= end for start, end in loops)
    return total


def said_of(tool, gpu, path, disassemble=True):
    """What the driver says of it, and its assembly."""
    with tempfile.NamedTemporaryFile("w", suffix=path.suffix) as copy:
        file = str(path)
        if path.suffix == ".wgsl":
            copy.write(for_naga(path))
            copy.flush()
            file = copy.name
        # The last is the widest of those that were compiled.
        said = json.loads(call(tool, gpu, file, "--json").strip().splitlines()[-1])[-1]
        return said, disassemble and call(tool, gpu, file, "--disasm")


def spilt(gpu, said):
    """Spills and fills, and bytes of scratch memory."""
    if gpu == "dg2":
        return said["Spill Count"] + said["Fill Count"], said["Scratch Memory Size"]
    return said["Spilled VGPRs"] + said["Spilled SGPRs"], said["Scratch size"]


def figures(tool, gpu, path):
    said, disassembly = said_of(tool, gpu, path)
    if gpu == "dg2":
        made = intel_multiplications(disassembly[disassembly.rindex("---- GEN Assembly") :])
        registers = f"{said['Max live registers']} live of 128"
        occupancy, cycles = f"SIMD{said['subgroup_size']}", said["Cycle Count"]
    else:
        made = said["subgroup_size"] * amd_multiplications(
            disassembly[disassembly.rindex("---- Assembly") :], said["subgroup_size"]
        )
        registers = f"{said['VGPRs']}"
        occupancy, cycles = f"{said['Subgroups per SIMD']} waves", said["Inverse Throughput"]
    return [registers, *spilt(gpu, said), occupancy, f"{64 * cycles / made:.1f}" if made else "-"]


def count_spills(tool, folder, every):
    failed = False
    for gpu in GPUS:
        paths = sorted((folder / gpu).iterdir())[::every]
        found = 0
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            said = pool.map(lambda path: said_of(tool, gpu, path, disassemble=False)[0], paths)
            for path, said in zip(paths, said):
                spills, scratch = spilt(gpu, said)
                if spills or scratch:
                    found += 1
                    print(f"{gpu}: {path.name}: {spills} spills and fills, {scratch} bytes of scratch", flush=True)
        print(f"{gpu}: {found} of {len(paths)} spill", flush=True)
        failed |= found != 0 or not paths
    return failed


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tool", required=True, type=shlex.split, help="the command that compiles for a GPU")
    p.add_argument("--spills", action="store_true", help="names what spills, and tables nothing")
    p.add_argument("--every", type=int, default=1, metavar="N", help="with --spills: looks at one text in N")
    p.add_argument("folder", type=pathlib.Path)
    args = p.parse_args()
    if args.spills:
        sys.exit(count_spills(args.tool, args.folder, args.every))
    sides = sorted(x for x in args.folder.iterdir() if x.is_dir())
    sides.sort(key=lambda side: side.name != "qkv")
    # Of attention by head dim and K's and V's type; of products by the rows that a thread has and the weights' storage.
    tables = [(kernel, "D, type", (64, 128), ("f32", "f16")) for kernel in ("prefill", "decode")]
    tables.append(("product", "rows, weights", (1, 4, 8), ("f32", "f16", "q8_0", "q4_0")))
    for (kernel, head, dims, kinds), (gpu, lanes) in itertools.product(tables, GPUS.items()):
        print(f"\n### {kernel}, {gpu}\n")
        print(f"| {head} | kernel | registers | spills and fills | scratch, bytes | occupancy | cycles per 64 multiply-adds |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for dim in dims:
            for kind in kinds:
                for side in sides:
                    for path in sorted(side.iterdir()):
                        name, part = re.fullmatch(r"(.*?)( \(.*\))?", path.stem).groups()
                        if name not in (f"{kernel}-{kind}-{dim}", f"{kernel}-{kind}-{dim}-{lanes}"):
                            continue
                        if part == " (matrices)" and gpu != "navi31":
                            continue
                        # The products of many rows are planned by the device's subgroups.
                        if kernel == "product" and part is None and dim > 1 and dim != ROWS[gpu]:
                            continue
                        cells = [f"{dim}, {kind}", side.name + (part or ""), *figures(args.tool, gpu, path)]
                        print(f"| {' | '.join(map(str, cells))} |")
                        sys.stdout.flush()


if __name__ == "__main__":
    main()
