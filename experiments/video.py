"""Films episodes of a checkpoint's policy: of offline.pt or last.pt of any of the four scripts.

    python experiments/video.py runs/NAME/last.pt
    python experiments/video.py runs/NAME/offline.pt --episodes 3 --out hopper.mp4

Writes a GIF, or an MP4 where imageio-ffmpeg is installed. Without a display MuJoCo renders through
EGL; where that is missing, MUJOCO_GL=osmesa makes it render on the CPU.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not os.environ.get("DISPLAY"):  # before MuJoCo is imported
    os.environ.setdefault("MUJOCO_GL", "egl")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gymnasium as gym
import numpy as np
import torch
import tyro
from landscape import read_policy
from tqdm import tqdm

import smac_offline_to_online as smac


@dataclass
class Args:
    checkpoint: Annotated[Path, tyro.conf.Positional]  # offline.pt, last.pt, ...
    episodes: int = 1  # one after another in the film
    out: Path | None = None  # .gif or .mp4; default: beside the checkpoint, under its name
    seed: int = 0  # of the episodes' starts
    fps: int = 25  # frames a second, at the speed of life


def follow_robot(env: gym.Env) -> None:
    """Locomotion's models have a camera that goes along with the robot."""
    model = getattr(env.unwrapped, "model", None)  # of MuJoCo
    if model is None:
        return
    for number in range(model.ncam):
        if model.camera(number).name == "track":
            env.unwrapped.mujoco_renderer.camera_id = number


@torch.no_grad()
def film(policy: torch.nn.Module, env: smac.TaskEnv, seed: int, every: int) -> list[np.ndarray]:
    """Every so manieth picture of an episode."""
    env.reset(seed)
    frames, over = [], False
    bar = tqdm(total=env.task.max_episode_steps, desc="steps", leave=False)
    while not over:
        if len(env.actions) % every == 0:
            frames.append(env.render())
        action = policy.mode(torch.as_tensor(env.obs)[None])[0].numpy()
        _, _, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        bar.update()
    bar.close()
    return frames


def write(path: Path, frames: list[np.ndarray], fps: float) -> None:
    if path.suffix == ".mp4":
        import imageio

        imageio.mimsave(path, frames, fps=fps, macro_block_size=1)
        return
    from PIL import Image

    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    milliseconds = round(100 / fps) * 10  # a GIF counts in hundredths of a second
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    out = args.out or args.checkpoint.expanduser().with_suffix(".gif")
    if out.suffix not in (".gif", ".mp4"):
        sys.exit(f"error: --out {out}: name a file that ends in .gif or .mp4.")
    if out.suffix == ".mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
        sys.exit("error: an MP4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or name a .gif.")
    saved = smac.read_checkpoint(args.checkpoint)
    smac.set_up(smac.Args(device="cpu"))
    policy = read_policy(saved)
    try:  # the library that renders is loaded here
        env = smac.TaskEnv(smac.Task(**saved["task"]), render_mode="rgb_array")
        follow_robot(env)
        env.reset(0)
        env.render()
    except Exception as error:  # each way to render fails with errors of its own
        way = os.environ.get("MUJOCO_GL", "a window")
        other = "osmesa" if way == "egl" else "egl"
        sys.exit(f"error: no pictures through {way} ({error}): try MUJOCO_GL={other}.")
    rate = env.metadata["render_fps"]
    every = max(1, round(rate / args.fps))
    frames = []
    for episode in range(args.episodes):
        seed = smac.episode_seed(args.seed, smac.FINAL, episode)
        frames += film(policy, env, seed, every)
        steps = len(env.actions)
        print(f"episode {episode}: normalized return {env.normalized_return():.1f}, {steps} steps")
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"writing {len(frames)} pictures ...", flush=True)
    write(out, frames, rate / every)
    print(out)
    env.close()


if __name__ == "__main__":
    main()
