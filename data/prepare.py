"""Writes data/NAME.hdf5, the one kind of file that the four scripts read.

    python data/prepare.py walker2d-medium-replay-v2       # D4RL's, downloaded; --list names all
    python data/prepare.py minari:mujoco/hopper/medium-v0  # Minari's, local or downloaded
    python data/prepare.py my.hdf5 --env-id Pusher-v5      # one's own rows under D4RL's names
    python data/prepare.py my.hdf5 --task door-binary-v0   # one's own rows for a known task
    python data/prepare.py runs/NAME                       # what a run has collected
    python data/prepare.py none --env-id Pusher-v5         # no rows: to learn online from scratch

docs/data.md has every source with its command. The file has a row a step, episodes one after
another; its attributes are `Task`'s fields and where the rows come from.

    observations (n, o)  float32
    actions      (n, a)  float32, rescaled from the environment's bounds to [-1, 1]
    rewards      (n,)    float32, raw. Binary Adroit: 1 on success, else 0. Kitchen: subtasks solved
    terminals    (n,)    bool: nothing is bootstrapped from here on
    ends         (n,)    bool: last row of an episode. Where it is no terminal, it only shows the
                         last state: its action and reward are no transition
    returns      (n,)    float32: the whole episode's raw return, in each of its rows. Binary
                         Adroit: -1 for each step without success. Kitchen: subtasks solved
"""

import difflib
import json
import os
import shlex
import shutil
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import h5py
import numpy as np
import tyro
from farama_notifications import notifications
from tqdm import tqdm

notifications.pop("gymnasium_robotics", None)  # of dense rewards; a run on such a task prints it

sys.path.append(os.getcwd())  # where one's own my_module:MyEnv-v0 may lie
FORMAT = "smac-dataset-1"
FOLDER = Path(__file__).resolve().parent
D4RL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
ROBOTICS = "gymnasium_robotics:"  # gym.make imports what stands before the colon


@dataclass
class Args:
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = ""
    """Known name, minari:ID, .hdf5 or .npz file, AWAC's folder, a run's folder or last.pt, none."""
    task: str = ""  # known task that one's own rows belong to
    env_id: str = ""  # any Gymnasium environment with bounded vectors for actions
    env_kwargs: str = "{}"  # its keyword arguments, as JSON
    max_episode_steps: int = 0  # 0: the environment's own limit
    out: str = ""  # default: beside this program, with the source's name
    cut: Literal["first", "last"] = "first"  # success that ends a binary task's episode
    obs_keys: tuple[str, ...] = ()  # robomimic: observations to put side by side
    list: bool = False  # print the known names


# ---- tasks
@dataclass
class Task:
    """What a file says about its environment. A reward in training is scale * raw + bias."""

    env_id: str
    env_kwargs: dict
    max_episode_steps: int
    family: str = "other"  # or locomotion, adroit, kitchen
    goals: int = 0  # 0: plain rewards. Else the reward counts goals, and all of them end an episode
    reward_scale: float = 1.0
    reward_bias: float = 0.0
    return_0: float = 0.0  # the raw return (with goals: last reward) whose normalized return is 0
    return_100: float = 100.0  # ... and 100


# Returns of D4RL's random and expert policies (its infos.py)
REFERENCES = {
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Ant": (-325.6, 3879.7),
}
KITCHENS = {
    "complete": "mini_kitchen_microwave_kettle_light_slider",
    "partial": "kitchen_microwave_kettle_light_slider",
    "mixed": "kitchen_microwave_kettle_bottomburner_light",
}


def describe(env_id: str, env_kwargs: dict, max_episode_steps: int) -> Task:
    """The task of an environment. Reward scales and biases of goal tasks are WSRL's."""
    task = Task(env_id, env_kwargs, max_episode_steps)
    robot = env_id.split("-")[0]
    if robot in REFERENCES:
        task.family = "locomotion"
        task.return_0, task.return_100 = REFERENCES[robot]
    if "AdroitHand" in env_id:
        task.family = "adroit"
    if "AdroitHand" in env_id and "Sparse" in env_id:
        task.goals = 1
        task.return_100 = 1.0
        task.reward_scale = 10.0
        task.reward_bias = -5.0
    if "FrankaKitchen" in env_id:
        task.family = "kitchen"
        task.goals = len(env_kwargs.get("tasks_to_complete", range(7)))  # all seven, unless named
        task.return_100 = float(task.goals)
        task.reward_bias = -float(task.goals)
    return task


def known_tasks() -> dict[str, Task]:
    tasks = {}
    for robot in REFERENCES:
        kwargs = {}
        if robot == "Ant":  # D4RL's contact forces are all zero, so here Ant goes without them
            kwargs = dict(include_cfrc_ext_in_observation=False, contact_cost_weight=0)
        for kind in ("random", "medium", "medium-replay", "medium-expert", "expert"):
            tasks[f"{robot.lower()}-{kind}-v2"] = describe(f"{robot}-v5", kwargs, 1000)
    for robot, steps in dict(pen=100, door=200, relocate=200).items():
        env_id = f"{ROBOTICS}AdroitHand{robot.title()}Sparse-v1"
        tasks[f"{robot}-binary-v0"] = describe(env_id, {}, steps)
    for kind in KITCHENS:
        subtasks = ["microwave", "kettle", "light switch", "slide cabinet"]
        if kind == "mixed":
            subtasks = ["microwave", "kettle", "bottom burner", "light switch"]
        kwargs = dict(tasks_to_complete=subtasks)
        tasks[f"kitchen-{kind}-v0"] = describe(f"{ROBOTICS}FrankaKitchen-v1", kwargs, 280)
    return tasks


KNOWN = known_tasks()


def find_task(args: Args, path: Path) -> Task:
    """The task that the flags name, else the one that the source names."""
    if args.task and args.env_id:
        sys.exit("error: --task names the environment already: leave --env-id away.")
    if args.env_kwargs != "{}" and not args.env_id:
        sys.exit("error: --env-kwargs belongs to --env-id: name the environment too.")
    if args.task and args.task not in KNOWN:
        sys.exit(f"error: there is no task {args.task}: {near(args.task)}.")
    limit = args.max_episode_steps
    if args.env_id:
        return environment_task(args.env_id, parse_kwargs(args.env_kwargs), limit)
    if args.task:
        task = KNOWN[args.task]
    elif args.source in KNOWN:
        task = KNOWN[args.source]
    elif args.source.startswith("minari:"):
        return minari_task(args.source, limit)
    elif is_run(path):
        task, _ = load_run(path)
    else:
        sys.exit(f"error: {args.source} names no environment: add --env-id ID or --task NAME.")
    return replace(task, max_episode_steps=limit or task.max_episode_steps)


def near(name: str) -> str:
    names = difflib.get_close_matches(name, KNOWN, n=3)
    if names:
        return f"did you mean {' or '.join(names)}"
    return "python data/prepare.py --list prints the known names"


def parse_kwargs(text: str) -> dict:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        sys.exit(f"error: --env-kwargs {text} is no JSON object: write it like '{{\"key\": 1}}'.")


def environment_task(env_id: str, env_kwargs: dict, max_episode_steps: int) -> Task:
    """The task of a Gymnasium id. Gymnasium-Robotics' get their module's prefix."""
    if ":" not in env_id:
        if env_id not in gym.registry:
            import gymnasium_robotics  # noqa: F401, it registers its environments
        spec = gym.registry.get(env_id)
        if spec is not None and str(spec.entry_point).startswith("gymnasium_robotics"):
            env_id = ROBOTICS + env_id
    env = make_env(env_id, env_kwargs)
    env.close()
    limit = max_episode_steps or env.spec.max_episode_steps
    if limit is None:
        sys.exit(f"error: {env_id} has no step limit: name one with --max-episode-steps.")
    return describe(env_id, env_kwargs, limit)


def make_env(env_id: str, env_kwargs: dict) -> gym.Env:
    try:
        return gym.make(env_id, **env_kwargs)
    except Exception as e:  # whatever an environment raises
        sys.exit(f"error: {env_id} cannot be made: check --env-id, --env-kwargs ({one_line(e)}).")


def one_line(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())


class Spaces(NamedTuple):
    observation: gym.Space
    obs_dim: int  # numbers in the networks' observation
    low: np.ndarray  # (a,), bounds of the source's actions
    high: np.ndarray


def find_spaces(task: Task) -> Spaces:
    """Of the task's environment. Refused: what `TaskEnv` of the scripts could not use."""
    env = make_env(task.env_id, task.env_kwargs)
    env.close()
    obs, action = env.observation_space, env.action_space
    if not is_vector(action) or not action.is_bounded():
        sys.exit(f"error: {task.env_id} has actions {action}: choose one with a bounded vector.")
    try:
        obs_dim = gym.spaces.flatdim(obs)
    except ValueError:
        obs_dim = 0
    if obs_dim == 0 or not (is_vector(obs) or isinstance(obs, gym.spaces.Dict)):
        sys.exit(f"error: {task.env_id} has observations {obs}: wrap it to have vectors.")
    if task.family == "kitchen":
        obs_dim = 30  # positions only, see `select`
    return Spaces(obs, obs_dim, action.low.astype(float), action.high.astype(float))


def is_vector(space: gym.Space) -> bool:
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 1


# ---- sources: each yields episodes, their steps in time order
class Episode(NamedTuple):
    observations: np.ndarray  # (n, o), or (n + 1, o) where the state after the last step is known
    actions: np.ndarray  # (n, a)
    rewards: np.ndarray  # (n,)
    terminal: bool


def find_episodes(args: Args, path: Path, task: Task, spaces: Spaces) -> Iterable[Episode]:
    if args.source == "none":
        return []
    if args.source.startswith("minari:"):
        return minari_episodes(args.source, task, spaces)
    if args.source in KNOWN:
        cached = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")
        if KNOWN[args.source].family == "adroit":
            return adroit_episodes(cached / "offpolicy_hand_data", task)
        url = D4RL + d4rl_file(args.source)
        path = cached / Path(url).name
        if not path.exists():
            download(url, path)
    if is_run(path):
        return run_episodes(path, task)
    if path.is_dir():
        return adroit_episodes(path, task)
    return file_episodes(path, task, args.obs_keys)


def d4rl_file(name: str) -> str:
    if name.startswith("kitchen"):
        return f"kitchen/{KITCHENS[name.split('-')[1]]}-v0.hdf5"
    robot, kind = name.removesuffix("-v2").split("-", 1)
    return f"gym_mujoco_v2/{robot}_{kind.replace('-', '_')}-v2.hdf5"


def download(url: str, path: Path) -> None:
    """Fetches an HDF5 file under a temporary name, looks whether it is whole, and renames it."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")  # others may fetch it at the same time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # 30 s without a byte end a dead connection; a slow one may take as long as it needs
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm.wrapattr(response, "read", total=size, desc=path.name) as body:
                shutil.copyfileobj(body, file)
        h5py.File(part).close()  # refuses what a broken connection leaves
        os.replace(part, path)
    except (OSError, HTTPException) as e:
        sys.exit(f"error: cannot download {url}: put it at {path} yourself ({one_line(e)}).")
    finally:
        if part.exists():
            part.unlink()


def file_episodes(path: Path, task: Task, obs_keys: tuple[str, ...]) -> Iterator[Episode]:
    """D4RL's names in an .hdf5 or .npz file, or an .hdf5 file in robomimic's layout."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                groups = [dict(file)]
        else:
            with h5py.File(path) as file:
                if file.attrs.get("format") == FORMAT:
                    sys.exit(f"error: {path} is prepared: give it to a script with --dataset.")
                if "data" in file:
                    groups = robomimic_demos(file["data"], path, obs_keys)
                else:
                    groups = [read_group(file)]
    except Exception as e:  # whatever h5py, numpy and zip raise
        sys.exit(f"error: {path} is no whole HDF5 or .npz file: get it again ({one_line(e)}).")
    for group in groups:
        yield from column_episodes(read_columns(group, path), task, path)


def read_group(group: h5py.Group) -> dict[str, np.ndarray]:
    columns = {}
    for name, column in group.items():
        if isinstance(column, h5py.Dataset):
            columns[name] = np.asarray(column)
    return columns


def robomimic_demos(data: h5py.Group, path: Path, obs_keys: tuple[str, ...]) -> list[dict]:
    """robomimic has a group an episode; in it obs/KEY (n, ...), actions, rewards, dones."""
    demos = []
    for name in sorted(data, key=lambda name: (len(name), name)):  # demo_2 before demo_10
        group = data[name]
        if not obs_keys or not set(obs_keys) <= set(group["obs"]):
            sys.exit(f"error: {path}: choose --obs-keys among {' '.join(group['obs'])}.")
        demo = read_group(group)
        demo["observations"] = side_by_side(group["obs"], obs_keys)
        if "next_obs" in group:
            demo["next_observations"] = side_by_side(group["next_obs"], obs_keys)
        demo["timeouts"] = np.zeros(len(demo["observations"]))  # a group is an episode
        demos.append(demo)
    return demos


def side_by_side(group: h5py.Group, keys: tuple[str, ...]) -> np.ndarray:
    parts = [group[key][:].reshape(len(group[key]), -1) for key in keys]
    return np.concatenate(parts, 1)


def read_columns(file: dict, path: Path) -> dict[str, np.ndarray]:
    """D4RL's columns. Errors: one is missing, or has another length than the observations."""
    columns = {}
    for name in ("observations", "actions", "next_observations"):
        if name in file:
            columns[name] = file[name]
    for name in ("rewards", "terminals", "timeouts"):
        column = file.get(name)
        if name == "terminals" and column is None:
            column = file.get("dones")
        if column is not None:
            columns[name] = column.reshape(-1)
    for name in ("observations", "actions", "rewards", "terminals"):
        if name not in columns:
            sys.exit(f"error: {path} has {', '.join(file)}, but no {name}: rename its columns.")
    shape = columns["observations"].shape
    for name, column in columns.items():
        is_wrong = len(shape) != 2 or column.shape[:1] != shape[:1]
        if name == "next_observations" and column.shape != shape:
            is_wrong = True
        if is_wrong or column.dtype.kind not in "fiub":
            what = f"{column.dtype} of shape {column.shape} beside observations of {shape}"
            sys.exit(f"error: {path}: {name} are {what}: give numbers, a row a step.")
    for name in ("terminals", "timeouts"):
        if name in columns and not np.isin(columns[name], (0, 1)).all():
            sys.exit(f"error: {path}: {name} have values besides 0 and 1: give booleans.")
    return columns


def column_episodes(columns: dict, task: Task, path: Path) -> Iterator[Episode]:
    """Cuts rows at terminals, time-outs and jumps; without time-outs by counting steps, as D4RL."""
    obs, n = columns["observations"], len(columns["rewards"])
    terminals = columns["terminals"] > 0
    ends = terminals.copy()
    if "timeouts" in columns:
        ends |= columns["timeouts"] > 0
    inside = np.flatnonzero(~ends[:-1])
    jumps = np.zeros(n, bool)
    if "next_observations" in columns:
        jumps = find_jumps(obs, columns["next_observations"])
        if len(inside) and jumps[inside].mean() > 0.5:
            print(f"{path.name}: rows are in no order, so each is an episode of one transition")
    elif are_shuffled(obs, inside):
        sys.exit(f"error: {path}: rows are in no order: add next_observations, or put them in it.")
    ends |= jumps
    start = 0
    for i in range(n):
        at_limit = "timeouts" not in columns and i + 1 - start == task.max_episode_steps
        if ends[i] or at_limit or i == n - 1:
            rows = slice(start, i + 1)
            states = obs[rows]
            if jumps[i]:
                states = np.concatenate([states, columns["next_observations"][i : i + 1]])
            actions, rewards = columns["actions"][rows], columns["rewards"][rows]
            yield Episode(states, actions, rewards, bool(terminals[i]))
            start = i + 1


def find_jumps(obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """Rows (n,) whose stored next state is not the next row's, to the precision of both columns."""
    precision = 0.0
    for column in (obs, next_obs):
        if column.dtype.kind == "f":
            precision = max(precision, 2 * float(np.finfo(column.dtype).eps))
    jumps = np.ones(len(obs), bool)  # nothing follows the last row
    for start in range(0, len(obs) - 1, 100_000):  # in parts, to save memory
        states = obs[1:][start : start + 100_000].astype(float)
        stored = next_obs[:-1][start : start + 100_000]
        same = np.abs(stored - states) <= 1e-6 + precision * np.abs(states)
        jumps[start : start + len(states)] = ~same.all(1)
    return jumps


def are_shuffled(obs: np.ndarray, inside: np.ndarray) -> bool:
    """Whether rows inside episodes differ from their next row as from any other, in every number.
    One number that changes slowly shows an order. Below 1,000 rows chance could decide."""
    if len(inside) < 1000:
        return False
    rng = np.random.default_rng(0)
    rows = rng.choice(inside, min(len(inside), 10_000), replace=False)
    steps = np.abs(obs[rows + 1] - obs[rows]).mean(0)
    others = np.abs(obs[rng.permutation(rows)] - obs[rows]).mean(0)
    varies = others > 0
    return bool(varies.any() and (steps > 0.9 * others)[varies].all())


def adroit_episodes(folder: Path, task: Task) -> Iterator[Episode]:
    """AWAC's two files for a binary task: demonstrations, and rollouts of a cloned policy."""
    if task.family != "adroit" or not task.goals:
        sys.exit(f"error: {folder} is no run's folder: for AWAC's add --task door-binary-v0.")
    robot = task.env_id.removeprefix(f"{ROBOTICS}AdroitHand").split("Sparse")[0].lower()
    for path in (folder / f"{robot}2_sparse.npy", folder / f"{robot}_bc_sparse4.npy"):
        if not path.is_file():
            awac = "offpolicy_hand_data (Google Drive 1yUdJnGgYit94X_AvV6JJP5Y3Lx2JF30Y)"
            sys.exit(f"error: there is no {path}: unpack AWAC's {awac} there.")
        try:
            recorded = np.load(path, allow_pickle=True)
        except Exception as e:  # whatever unpickling raises
            sys.exit(f"error: {path} is no whole .npy file: unpack it again ({one_line(e)}).")
        for e in recorded:
            obs = []
            for state in e["observations"]:
                if isinstance(state, dict):
                    state = state["state_observation"]
                obs.append(state)
            n = min(len(obs), len(e["actions"]), len(e["rewards"]))  # some: a reward too many
            rewards = np.reshape(e["rewards"][:n], n)
            yield Episode(np.asarray(obs[:n]), np.asarray(e["actions"][:n]), rewards, False)


def load_minari(source: str):
    import minari

    try:
        return minari.load_dataset(source.removeprefix("minari:"), download=True)
    except Exception as e:  # whatever minari's storage, its hub or the network raise
        how = "`minari list remote` shows the names, pip install 'minari[hf]' what it needs"
        sys.exit(f"error: {source} cannot be loaded: {how} ({one_line(e)}).")


def minari_task(source: str, max_episode_steps: int) -> Task:
    """The environment that a dataset names, with Minari's references where there are some."""
    dataset = load_minari(source)
    spec = dataset.env_spec
    if spec is None:
        sys.exit(f"error: {source} names no environment: add --env-id ID or --task NAME.")
    kwargs = dict(spec.kwargs)
    kwargs.pop("render_mode", None)
    task = environment_task(spec.id, kwargs, max_episode_steps or spec.max_episode_steps)
    low = dataset.storage.metadata.get("ref_min_score")
    high = dataset.storage.metadata.get("ref_max_score")
    if task.goals == 0 and low is not None and high is not None and low < high:
        task.return_0, task.return_100 = float(low), float(high)
    return task


def minari_episodes(source: str, task: Task, spaces: Spaces) -> Iterator[Episode]:
    """Minari's episodes have n + 1 observations. A Dict of them is flattened as Gymnasium does."""
    for e in load_minari(source).iterate_episodes():
        obs, rewards = e.observations, e.rewards
        if task.family == "kitchen":
            rewards = np.cumsum(rewards)  # recorded is 1 for each subtask, once
        if task.family == "adroit" and task.goals:
            if "success" not in (e.infos or {}):
                sys.exit(f"error: {source} has no success in its infos: name a dense --env-id.")
            rewards = np.asarray(e.infos["success"], float)[-len(e.actions) :]  # some have n + 1
        try:
            if task.family == "kitchen" and isinstance(obs, dict):
                obs = obs["observation"]
            elif not isinstance(obs, np.ndarray):
                obs = flatten(spaces.observation, obs, len(e.actions) + 1)
        except Exception as error:  # whatever a missing or misshapen part raises
            problem = f"observations are not those of {task.env_id}: name another --env-id"
            sys.exit(f"error: {source}: {problem} ({one_line(error)}).")
        yield Episode(obs, e.actions, rewards, bool(e.terminations[-1]))


def flatten(space: gym.Space, obs, n: int) -> np.ndarray:
    """n observations, a tree of arrays, as gymnasium.spaces.flatten has each: (n, o)."""
    if isinstance(space, gym.spaces.Dict):
        parts = [flatten(part, obs[key], n) for key, part in space.items()]
        return np.concatenate(parts, 1)
    if isinstance(space, gym.spaces.Tuple):
        parts = [flatten(part, obs[i], n) for i, part in enumerate(space)]
        return np.concatenate(parts, 1)
    return np.stack([gym.spaces.flatten(space, obs[i]) for i in range(n)])


def is_run(path: Path) -> bool:
    return path.suffix == ".pt" or any((path / x).exists() for x in ("last.pt", "config.json"))


@cache
def load_run(path: Path) -> tuple[Task, dict]:
    """The task and the replay in a run's last.pt."""
    import torch

    if path.is_dir():
        path = path / "last.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        values = dict(saved["task"])
        values.pop("mean_normalized_return", None)  # of the dataset that the run began with
        return Task(**values), saved["replay"]
    except Exception as e:  # whatever unpickling raises
        sys.exit(f"error: {path} holds no replay: name a run's last.pt ({one_line(e)}).")


def run_episodes(path: Path, task: Task) -> Iterator[Episode]:
    """The replay's rows s, a, training reward, s', terminal. Time-outs are seen as jumps."""
    _, replay = load_run(path)
    if len(replay["rows"]) == 0:
        sys.exit(f"error: {path} has collected nothing: it had no online steps yet.")
    parts = np.split(replay["rows"].numpy(), np.cumsum(replay["sizes"])[:-1], 1)
    rewards = (parts[2][:, 0].astype(float) - task.reward_bias) / task.reward_scale
    if task.goals:
        rewards = rewards.round()
    columns = dict(observations=parts[0], actions=parts[1], rewards=rewards)
    columns["next_observations"] = parts[3]
    columns["terminals"] = parts[4][:, 0]
    columns["timeouts"] = np.zeros(len(rewards))
    return column_episodes(columns, task, path)


# ---- checks
def conform(episodes: Iterable[Episode], task: Task, spaces: Spaces, source: str) -> list[Episode]:
    """Episodes with the networks' observations, actions rescaled to [-1, 1] (not clipped yet), and
    success for rewards of a binary task. Ends with a sentence at what would spoil a run later."""
    conformed = []
    rows, largest, beyond = 0, 0.0, 0
    middle, half = (spaces.high + spaces.low) / 2, (spaces.high - spaces.low) / 2
    for e in episodes:
        check_values(e, rows, source)
        obs = select(e.observations, task)
        sizes = (obs.shape[1], e.actions.shape[1])
        needed = (spaces.obs_dim, len(middle))
        if sizes != needed:
            problem = f"observations and actions have {sizes} numbers, {task.env_id} has {needed}"
            sys.exit(f"error: {source}: {problem}: name its own --env-id.")
        actions = (e.actions - middle) / half
        largest = max(largest, np.abs(actions).max())
        beyond += int((np.abs(actions) > 1).sum())
        rows += len(actions)
        conformed.append(Episode(obs, actions, e.rewards.astype(float), e.terminal))
    excess = f"{50 * (largest - 1):.2g} % of their range beyond the bounds"  # the range is 2
    if largest > 1.2:
        sys.exit(f"error: {source}: actions reach {excess} of {task.env_id}: rescale them.")
    if beyond:
        print(f"clipped: {beyond:,} numbers of actions, which reach {excess}")
    if task.family == "adroit" and task.goals:
        return to_success(conformed, source)
    return conformed


def check_values(e: Episode, row: int, source: str) -> None:
    """Shapes, and finite numbers. `row` is the source's row at which the episode begins."""
    n = len(e.actions)
    columns = dict(observations=e.observations[:n], actions=e.actions, rewards=e.rewards)
    if len(e.observations) == n + 1:
        columns["last observations"] = e.observations[n:]
    for name, column in columns.items():
        dims, length = 2, n
        if name == "rewards":
            dims = 1
        if name == "last observations":
            length = 1
        if column.dtype.kind not in "fiub" or column.ndim != dims or len(column) != length:
            shape = f"{column.dtype} of shape {column.shape} beside {n} actions"
            sys.exit(f"error: {source}: {name} at row {row} are {shape}: give a row a step.")
        if not np.isfinite(column).all():
            bad = row + int(np.argwhere(~np.isfinite(column))[0][0])
            sys.exit(f"error: {source}: {name} have NaN or infinity, first in row {bad}: mend it.")


def select(obs: np.ndarray, task: Task) -> np.ndarray:
    """The numbers that a file and the environment have in common: (n, o)."""
    size = obs.shape[1]
    if task.family == "kitchen" and size == 60:  # D4RL's: 30 positions, then the goal's
        return obs[:, :30]
    if task.family == "kitchen" and size == 59:  # FrankaKitchen-v1's: 9 joints, velocities, objects
        return np.concatenate([obs[:, :9], obs[:, 18:39]], 1)
    contact = task.env_kwargs.get("include_cfrc_ext_in_observation", True)
    if task.env_id == "Ant-v5" and not contact and size in (105, 111):
        return obs[:, :27]
    return obs


def to_success(episodes: list[Episode], source: str) -> list[Episode]:
    """Rewards of a binary task, 0 and -1 or 1 and 0, as 1 and 0."""
    values = set()
    for e in episodes:
        values.update(np.unique(e.rewards).tolist())
    if -1 in values and values <= {-1, 0}:
        return [e._replace(rewards=e.rewards + 1) for e in episodes]
    if not values <= {0, 1}:
        some = ", ".join(f"{value:g}" for value in sorted(values)[:4])
        sys.exit(f"error: {source}: rewards are {some}: give 0 and -1, or 1 and 0 (success).")
    return episodes


# ---- rows
def cut_episode(e: Episode, task: Task, cut: str) -> dict[str, np.ndarray] | None:
    """The file's rows of an episode; None where no transition is left. A binary task's episode
    without success is left out (Cal-QL); one with success ends there, as it does online."""
    n = len(e.actions)
    terminals = np.zeros(n, bool)
    terminals[-1] = e.terminal
    if task.goals:
        terminals = e.rewards >= task.goals
        reached = np.flatnonzero(terminals)
        if len(reached):
            n = reached[0] + 1
        if len(reached) and task.family == "adroit" and cut == "last":
            n = reached[-1] + 1
        if len(reached) == 0 and task.family == "adroit":
            return None
    rewards, terminals = e.rewards[:n], terminals[:n]
    total = rewards.sum()
    if task.family == "kitchen":
        total = rewards.max()
    elif task.goals:
        total = rewards.sum() - n
    more = 0
    if not terminals[-1] and len(e.observations) > n:
        more = 1  # one row more, which shows the last state
    if n + more == 1 and not terminals[0]:
        return None
    # clipped so that atanh stays finite
    actions = e.actions[:n].clip(-1 + 1e-5, 1 - 1e-5)
    return dict(
        observations=e.observations[: n + more].astype(np.float32),
        actions=np.pad(actions, ((0, more), (0, 0))).astype(np.float32),
        rewards=np.pad(rewards, (0, more)).astype(np.float32),
        terminals=np.pad(terminals, (0, more)),
        ends=np.arange(n + more) == n + more - 1,
        returns=np.full(n + more, total, np.float32),
    )


def to_rows(episodes: list[Episode], task: Task, spaces: Spaces, args: Args) -> dict:
    """The file's columns, of all episodes with a transition left. Prints what is left out."""
    columns = dict(
        observations=[np.zeros((0, spaces.obs_dim), np.float32)],
        actions=[np.zeros((0, len(spaces.low)), np.float32)],
        rewards=[np.zeros(0, np.float32)],
        terminals=[np.zeros(0, bool)],
        ends=[np.zeros(0, bool)],
        returns=[np.zeros(0, np.float32)],
    )
    left_out, cut_steps = 0, 0
    for e in episodes:
        rows = cut_episode(e, task, args.cut)
        if rows is None:
            left_out += 1
            continue
        cut_steps += max(0, len(e.actions) - len(rows["ends"]))
        for name, column in rows.items():
            columns[name].append(column)
    is_binary = task.family == "adroit" and task.goals > 0
    if left_out == len(episodes) and args.source != "none":
        if is_binary:
            sys.exit(f"error: {args.source} has no success: a binary task needs episodes with one.")
        sys.exit(f"error: {args.source} has no transition: check that it has rows in time order.")
    if left_out and is_binary:
        print(f"left out: {left_out:,} of {len(episodes):,} episodes, which have no success")
    elif left_out:
        print(f"left out: {left_out:,} of {len(episodes):,} episodes, a row without a next state")
    if cut_steps:
        print(f"cut:      {cut_steps:,} steps after the {args.cut} time that all goals are reached")
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def mean_normalized_return(episodes: list[Episode], task: Task) -> float:
    """Of all episodes of a source: 0 is a random policy's, 100 an expert's or all goals."""
    values = []
    for e in episodes:
        if task.goals:
            values.append(e.rewards.max())
        else:
            values.append(e.rewards.sum())
    if not values:
        return 0.0
    return float(100 * (np.mean(values) - task.return_0) / (task.return_100 - task.return_0))


def write(path: Path, columns: dict[str, np.ndarray], attributes: dict) -> None:
    """The file, under a temporary name until it is whole."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(part, "w") as file:
            for name, column in columns.items():
                packed = dict(compression="gzip", compression_opts=9, shuffle=True)
                if len(column) == 0:
                    packed = {}  # HDF5 packs nothing that is empty
                file.create_dataset(name, data=column, **packed)
            file.attrs.update(attributes)
        os.replace(part, path)
    except OSError as e:
        sys.exit(f"error: {path} cannot be written: name another with --out ({one_line(e)}).")
    finally:
        if part.exists():
            part.unlink()


def summarize(columns: dict[str, np.ndarray]) -> None:
    terminals, ends, returns = columns["terminals"], columns["ends"], columns["returns"]
    used = terminals | ~ends
    quantiles = np.quantile(returns[ends], (0, 0.25, 0.5, 0.75, 1))
    text = " / ".join(f"{value:.0f}" for value in quantiles)
    on_bounds = 100 * (np.abs(columns["actions"][used]) > 0.999).mean()
    print(f"rows:     {len(used):,}, of them {used.sum():,} transitions; {ends.sum():,} episodes")
    print(
        f"ends:     {terminals.sum():,} terminals, {(ends & ~terminals).sum():,} time-outs or cuts"
    )
    print(f"returns:  mean {returns[ends].mean():.1f}, quantiles 0/25/50/75/100 %: {text}")
    print(f"actions:  {on_bounds:.1f} % on the bounds")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.list:
        print("\n".join(KNOWN))
        return
    if not args.source:
        sys.exit("error: name a source: python data/prepare.py --help shows the kinds.")
    path = Path(args.source).expanduser()
    source = args.source
    is_file = source != "none" and source not in KNOWN and not source.startswith("minari:")
    if is_file and not path.exists():
        sys.exit(f"error: there is no file or name {source}: {near(source)}.")
    if is_file:
        source = path.resolve().name
    out = FOLDER / f"{default_name(args, path)}.hdf5"
    if args.out:
        out = Path(args.out).expanduser()
    if out.resolve() == path.resolve():
        sys.exit(f"error: {out} is the source itself: name another file with --out.")

    task = find_task(args, path)
    spaces = find_spaces(task)
    episodes = find_episodes(args, path, task, spaces)
    if is_file and is_run(path):  # its actions are in [-1, 1] already
        spaces = spaces._replace(low=-np.ones(len(spaces.low)), high=np.ones(len(spaces.low)))
    episodes = conform(episodes, task, spaces, args.source)
    columns = to_rows(episodes, task, spaces, args)

    command = ["prepare.py"]
    names = {args.source: source, args.out: out.name, f"--out={args.out}": f"--out={out.name}"}
    for word in sys.argv[1:]:  # without the folders of this machine
        command.append(names.get(word, word))
    attributes = asdict(task)
    attributes["format"] = FORMAT
    attributes["env_kwargs"] = json.dumps(task.env_kwargs)
    attributes["mean_normalized_return"] = mean_normalized_return(episodes, task)
    attributes["source"] = source
    attributes["command"] = shlex.join(command)
    write(out, columns, attributes)
    print(f"file:     {out}")
    dataset = out
    if out.resolve().parent == FOLDER:
        dataset = out.stem
    if source == "none":
        print(f"go on:    python smac_offline_to_online.py --dataset {dataset} --offline-steps 0")
        return
    summarize(columns)
    print(f"normalized mean return of all episodes: {attributes['mean_normalized_return']:.1f}")
    preset = "small-adroit" if task.family == "adroit" else "small"
    print("without --preset: the paper's sizes, which on a CPU take days")
    print(f"go on:    python smac_offline_to_online.py --dataset {dataset} --preset {preset}")


def default_name(args: Args, path: Path) -> str:
    if args.source == "none":
        return f"{(args.task or args.env_id).split(':')[-1].lower()}-empty"
    if args.source in KNOWN:
        return args.source
    if args.source.startswith("minari:"):
        return args.source.removeprefix("minari:").replace("/", "-")
    if path.name == "last.pt":
        path = path.resolve().parent
    if path.is_dir():
        return path.resolve().name
    return path.stem


if __name__ == "__main__":
    main()
