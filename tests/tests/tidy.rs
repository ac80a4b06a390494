//! Keeps the architecture: reads the sources and checks who mentions what. The rules are those of
//! `docs/architecture.md`; each says why it is there, and its message says where it is broken.
//!
//! It reads text, not syntax: comments, string literals and test modules are blanked first, and a name counts
//! wherever it stands then.

use anyhow::{Context, Result, ensure};
use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

/// Names that some files must not mention.
struct Rule {
    /// Why; ends every message of this rule.
    reason: &'static str,
    /// Files that it holds for: a path or the start of one.
    within: &'static [&'static str],
    /// Files of these that it does not hold for.
    except: &'static [&'static str],
    /// The names. One that starts with a letter is found at the start of a word only.
    names: &'static [&'static str],
}

/// Logic that is decided by its arguments alone.
const PURE: [&str; 23] = [
    "proto/src/",
    "coordinator/src/plan",
    "coordinator/src/job",
    "coordinator/src/membership",
    "coordinator/src/straggler",
    "coordinator/src/goodput",
    "coordinator/src/control/curve",
    "coordinator/src/control/ledger",
    "coordinator/src/recipe",
    "coordinator/src/view",
    "worker/src/random.rs",
    "worker/src/timings.rs",
    "worker/src/data/sampler",
    "worker/src/optim/schedule",
    "worker/src/optim/grad_scaler",
    "worker/src/head/margin",
    "worker/src/head/sampling",
    "worker/src/head/lazy_sgd",
    "worker/src/checkpoint/reshard",
    "worker/src/dial.rs",
    "worker/src/agent/gpus",
    "worker/src/agent/liveness",
    "worker/src/agent/stall",
];

const RULES: [Rule; 20] = [
    Rule {
        reason: "pure modules get what they need as arguments and return what is to be done or logged",
        within: &PURE,
        except: &[],
        names: &[
            "async ",
            ".await",
            "tokio::",
            "Instant::now",
            "SystemTime::now",
            "UNIX_EPOCH.elapsed",
            "rand::",
            "tracing::",
            "log::",
            "println!",
            "eprintln!",
            "std::fs",
            "std::net",
            "std::env",
            "thread::",
        ],
    },
    Rule {
        reason: "clocks are read by those who act in time: control, agent, rank and the rims; others take times as \
                 arguments",
        within: &["coordinator/src/", "worker/src/"],
        except: &[
            "coordinator/src/control",
            "coordinator/src/cli",
            "coordinator/src/server",
            // Leases lapse.
            "coordinator/src/store/etcd/election",
            "coordinator/src/telemetry",
            // How old an answer is that viewers of the status page share.
            "coordinator/src/web/cache",
            "worker/src/agent",
            "worker/src/rank",
            "worker/src/tools",
            "worker/src/main.rs",
            // How long calls took, for the metrics.
            "coordinator/src/api",
            // How long training waited for data.
            "worker/src/data/loader",
            // Deadlines of calls to peers.
            "worker/src/collective",
        ],
        names: &["Instant::now", "SystemTime::now", ".elapsed()", "clock_gettime"],
    },
    Rule {
        reason: "gRPC ends at the rim: api, cli and server in the coordinator, agent and rank/report in the worker",
        within: &["coordinator/src/", "worker/src/"],
        except: &[
            "coordinator/src/api",
            "coordinator/src/cli",
            "coordinator/src/server",
            // etcd speaks gRPC itself: what its errors mean.
            "coordinator/src/store/etcd",
            "worker/src/agent",
            "worker/src/rank/report",
            "worker/src/channel",
            "coordinator/src/tls",
        ],
        names: &["tonic", "tonic_types", "tonic_health"],
    },
    Rule {
        reason: "only collective/ opens sockets between ranks; metrics and gRPC sockets belong to their libraries; \
                 agent/route asks the kernel for a route and sends nothing",
        within: &["worker/src/"],
        except: &["worker/src/collective", "worker/src/agent/route"],
        names: &[
            "TcpStream",
            "TcpListener",
            "UdpSocket",
            "UnixStream",
            "UnixListener",
        ],
    },
    Rule {
        reason: "the store keeps keys and bytes: what they mean is decided above it",
        within: &["coordinator/src/store"],
        except: &[],
        names: &[
            "crate::control",
            "crate::plan",
            "crate::job",
            "crate::membership",
            "crate::api",
        ],
    },
    Rule {
        reason: "the database is behind the StateStore trait",
        within: &["coordinator/src/"],
        except: &["coordinator/src/store"],
        names: &["redb", "etcd_client"],
    },
    Rule {
        reason: "object stores are behind checkpoint/location: ranks ask for parts, not for requests",
        within: &["worker/src/"],
        except: &["worker/src/checkpoint/location"],
        names: &["object_store", "rustls"],
    },
    Rule {
        reason: "api decodes, asks control and encodes: it decides nothing and stores nothing",
        within: &["coordinator/src/api"],
        except: &[],
        names: &["crate::store", "crate::plan", "crate::membership"],
    },
    Rule {
        reason: "the status page looks and changes nothing: web asks control what there is",
        within: &["coordinator/src/web"],
        except: &[],
        names: &[
            "crate::store",
            "crate::plan",
            "crate::membership",
            "crate::job",
            "crate::cli",
            ".submit(",
            ".cancel(",
            ".drain(",
        ],
    },
    Rule {
        reason: "HTTP for people and Prometheus is web's; gRPC's is tonic's",
        within: &["coordinator/src/"],
        except: &["coordinator/src/web"],
        names: &["axum", "hyper::", "hyper_util"],
    },
    Rule {
        reason: "the agent never touches a tensor: it must outlive what ranks do to libtorch and the GPU",
        within: &["worker/src/agent"],
        except: &[],
        names: &[
            "tch::",
            "use tch",
            "crate::rank",
            "crate::model",
            "crate::head",
            "crate::optim",
            "crate::data",
            "crate::eval",
            "crate::collective",
        ],
    },
    Rule {
        reason: "networks, losses and update rules are arithmetic: no files, no sockets, no gRPC messages",
        within: &["worker/src/model", "worker/src/head", "worker/src/optim"],
        except: &[],
        names: &[
            "std::fs",
            "fs::",
            "File::",
            "std::net",
            "tokio",
            "arcface_proto::v1",
        ],
    },
    Rule {
        reason: "a network does not know how many ranks or GPUs there are",
        within: &["worker/src/model"],
        except: &[],
        names: &[
            "crate::collective",
            "crate::rank",
            "crate::head",
            "crate::agent",
            "world_size",
        ],
    },
    Rule {
        reason: "collectives move numbers: they know no network, no head and no job",
        within: &["worker/src/collective"],
        except: &[],
        names: &[
            "crate::model",
            "crate::head",
            "crate::optim",
            "crate::rank",
            "crate::agent",
            "crate::data",
            "arcface_proto::v1",
        ],
    },
    Rule {
        reason: "what is read, written, drawn and evaluated does not depend on the process that does it",
        within: &[
            "worker/src/data",
            "worker/src/checkpoint",
            "worker/src/eval",
            "worker/src/export",
        ],
        except: &[],
        names: &["crate::rank", "crate::agent", "crate::tools"],
    },
    Rule {
        reason: "OpenTelemetry is behind traces/: others make spans and know no exporter",
        within: &["proto/src/", "coordinator/src/", "worker/src/"],
        except: &[],
        names: &["opentelemetry"],
    },
    Rule {
        reason: "spans are made by those who act in time: the coordinator's control/episode, agents and ranks; nothing is \
                 decided by them",
        within: &["proto/src/", "coordinator/src/", "worker/src/"],
        except: &[
            "coordinator/src/control/episode",
            "worker/src/agent/mod.rs",
            "worker/src/rank/spans",
            // Where a process begins to send them.
            "coordinator/src/cli",
            "worker/src/main.rs",
            "worker/src/tools/rank",
        ],
        names: &["arcface_traces"],
    },
    Rule {
        reason: "CUDA's libraries are opened when somebody asked for CUDA, by device/, nvrtc/ and collective/nccl alone: \
                 libtorch's answer to tch::Cuda is final, and cudarc panics where a library is missing",
        within: &["proto/src/", "coordinator/src/", "worker/src/"],
        except: &[
            "worker/src/device",
            "worker/src/nvrtc",
            "worker/src/collective/nccl/library.rs",
        ],
        names: &[
            "cudarc",
            "nvml_wrapper",
            "libloading",
            "tch::Cuda",
            "Cuda::",
            "crate::nvrtc",
        ],
    },
    Rule {
        reason: "std::process::exit skips destructors and pending writes: return from main instead",
        within: &["coordinator/src/", "worker/src/", "proto/src/", "traces/src/"],
        except: &["coordinator/src/main.rs", "worker/src/main.rs"],
        names: &["process::exit", "process::abort"],
    },
    Rule {
        reason: "unfinished code does not land",
        within: &["proto/", "traces/", "coordinator/", "worker/", "tests/"],
        except: &[],
        names: &["todo!", "unimplemented!", "#[ignore", "dbg!"],
    },
];

/// Files with unsafe code, each with its reason in its head and `SAFETY:` at every block (clippy sees to that).
const UNSAFE: [&str; 36] = [
    "coordinator/tests/simulation/determinism.rs",
    "worker/src/allocator.rs",
    "worker/src/collective/memory.rs",
    "worker/src/collective/nccl/library.rs",
    "worker/src/data/mmap.rs",
    "worker/src/data/planes.rs",
    "worker/src/device/graph.rs",
    "worker/src/device/launcher.rs",
    "worker/src/device/libraries.rs",
    "worker/src/device/placement.rs",
    "worker/src/device/streams.rs",
    "worker/src/head/cuda/tests/golden.rs",
    "worker/src/head/cuda/tests/head.rs",
    "worker/src/head/cuda/tests/launch.rs",
    "worker/src/head/cuda/twin/mod.rs",
    "worker/src/head/cuda/twin/sampling.rs",
    "worker/src/head/cuda/twin/softmax.rs",
    "worker/src/head/tiled/kernel/amx.rs",
    "worker/src/head/tiled/kernel/amx/emulator.rs",
    "worker/src/head/tiled/kernel/gemm.rs",
    "worker/src/head/tiled/kernel/isa.rs",
    "worker/src/kernels/call.rs",
    "worker/src/kernels/launch.rs",
    "worker/src/kernels/twin/launcher.rs",
    "worker/src/kernels/twin/mod.rs",
    "worker/src/model/native/allocations.rs",
    "worker/src/model/native/backward.rs",
    "worker/src/model/native/convolution.rs",
    "worker/src/model/native/layout.rs",
    "worker/src/model/native/mod.rs",
    "worker/src/model/norm/kernels.rs",
    "worker/src/model/norm/mod.rs",
    "worker/src/nvrtc/library.rs",
    "worker/src/optim/fused.rs",
    "worker/src/slices.rs",
    "worker/tests/cuda_graphs.rs",
];

/// A file longer than this hides two subjects.
const MOST_LINES: usize = 700;

/// A source file with its path from the root.
struct Source {
    path: String,
    text: String,
}

/// Every text file that the project wrote; build outputs, data and the lock file are not.
fn sources() -> Result<Vec<Source>> {
    let root = arcface_tests::workspace();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
            let path = entry?.path();
            let relative = path.strip_prefix(&root)?.to_string_lossy().into_owned();
            if path.is_dir() {
                let built = path.file_name().is_some_and(|name| name == "target");
                if !built && !matches!(relative.as_str(), ".git" | "work_dirs") {
                    folders.push(path);
                }
            } else if is_text(&path) {
                let text = fs::read_to_string(&path).with_context(|| format!("read {relative}"))?;
                found.push(Source { path: relative, text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    ensure!(
        found.len() > 20,
        "only {} files found: is this the source tree?",
        found.len()
    );
    Ok(found)
}

fn is_text(path: &Path) -> bool {
    const ENDINGS: [&str; 20] = [
        "rs", "c", "cpp", "cu", "cuh", "h", "toml", "proto", "sh", "py", "md", "yml", "yaml", "service",
        "env", "json", "txt", "html", "css", "js",
    ];
    let name = path.file_name().unwrap_or_default();
    name == "Makefile"
        || name == "run"
        || path
            .extension()
            .is_some_and(|e| ENDINGS.iter().any(|ending| e == *ending))
}

fn is_rust(source: &Source) -> bool {
    source.path.ends_with(".rs")
}

/// Test code is free to use clocks, files and sockets.
fn is_test(path: &str) -> bool {
    let path = PathBuf::from(path);
    path.components().any(|part| part.as_os_str() == "tests")
        || path
            .file_stem()
            .is_some_and(|stem| stem == "tests" || stem == "suite")
}

/// The text without comments, string literals and the test module at its end; lines keep their numbers.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod ").unwrap_or(text.len());
    let mut out = String::with_capacity(end);
    let mut chars = text[..end].chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '/' if chars.peek() == Some(&'/') => while chars.next_if(|c| *c != '\n').is_some() {},
            '"' => {
                out.push('"');
                while let Some(c) = chars.next() {
                    match c {
                        // An escaped character is skipped; an escaped line end keeps the lines' numbers.
                        '\\' => out.extend(chars.next().filter(|next| *next == '\n')),
                        '"' => break,
                        '\n' => out.push('\n'),
                        _ => {}
                    }
                }
                out.push('"');
            }
            // A quote as a character is not the start of a string.
            '\'' if chars.peek() == Some(&'"') => {
                chars.next();
                out.push(' ');
            }
            '\'' if chars.peek() == Some(&'\\') => {
                chars.next();
                chars.next();
                out.push(' ');
            }
            _ => out.push(c),
        }
    }
    out
}

/// True if `name` stands in `line` and, if it starts like a word, at the start of one.
fn mentions(line: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(name)
        .any(|(at, _)| !name.starts_with(is_word) || !line[..at].ends_with(is_word))
}

fn starts_with_any(path: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| path.starts_with(prefix))
}

/// Fails with one line for every break of a rule.
fn none(broken: String) -> Result<()> {
    ensure!(broken.is_empty(), "\n{broken}");
    Ok(())
}

#[test]
fn modules_mention_only_what_they_may_know() -> Result<()> {
    let mut broken = String::new();
    for source in sources()?.iter().filter(|source| is_rust(source)) {
        let code = code(&source.text);
        for rule in &RULES {
            let in_tests = is_test(&source.path) && !rule.within.contains(&"tests/");
            if in_tests
                || source.path == "tests/tests/tidy.rs"
                || !starts_with_any(&source.path, rule.within)
                || starts_with_any(&source.path, rule.except)
            {
                continue;
            }
            for (number, line) in code.lines().enumerate() {
                for name in rule.names.iter().filter(|name| mentions(line, name)) {
                    let number = number + 1;
                    writeln!(
                        broken,
                        "{}:{number}: mentions {name:?}: {}",
                        source.path, rule.reason
                    )?;
                }
            }
        }
    }
    none(broken)
}

#[test]
fn unsafe_code_is_in_named_files_only() -> Result<()> {
    let mut broken = String::new();
    for source in sources()?.iter().filter(|source| is_rust(source)) {
        let has = code(&source.text).lines().any(|line| mentions(line, "unsafe "));
        let named = UNSAFE.contains(&source.path.as_str()) || source.path == "tests/tests/tidy.rs";
        if has && !named {
            writeln!(
                broken,
                "{}: has unsafe code: move it to a named file, or name this one in UNSAFE with the reason in its head",
                source.path
            )?;
        }
    }
    none(broken)
}

#[test]
fn every_rust_file_opens_with_its_purpose_and_stays_short() -> Result<()> {
    let mut broken = String::new();
    for source in sources()?.iter().filter(|source| is_rust(source)) {
        if !source.text.starts_with("//!") {
            writeln!(
                broken,
                "{}: does not open with //!: a reader wants to know first what the file owns and what it must not know",
                source.path
            )?;
        }
        let lines = source.text.lines().count();
        if lines > MOST_LINES {
            writeln!(
                broken,
                "{}: {lines} lines: over {MOST_LINES}, split it by kind of event or meaning",
                source.path
            )?;
        }
    }
    none(broken)
}

#[test]
fn nothing_is_left_for_later_and_no_machine_is_named() -> Result<()> {
    // Put together here so that this file does not name what it looks for.
    let later = [
        ["TO", "DO"].concat(),
        ["FIX", "ME"].concat(),
        ["XX", "X"].concat(),
    ];
    let machine = [
        ["/ro", "ot/"].concat(),
        ["/ho", "me/"].concat(),
        ["/wo", "rk/"].concat(),
    ];
    let registry = [
        ["pypi", ".org"].concat(),
        ["python", "hosted"].concat(),
        ["download.py", "torch"].concat(),
        ["crates", ".io"].concat(),
    ];
    let mut broken = String::new();
    for source in sources()? {
        for (number, line) in source.text.lines().enumerate() {
            let place = format!("{}:{}", source.path, number + 1);
            for word in later.iter().filter(|word| mentions(line, word)) {
                writeln!(
                    broken,
                    "{place}: {word}: finish it or write down the decision in docs/decisions.md"
                )?;
            }
            for path in machine.iter().filter(|path| mentions_path(line, path)) {
                writeln!(
                    broken,
                    "{place}: {path}: one machine's path is wrong on every other"
                )?;
            }
            for host in registry.iter().filter(|host| line.contains(host.as_str())) {
                writeln!(
                    broken,
                    "{place}: {host}: packages are named by name and version; hosts are settings"
                )?;
            }
        }
    }
    none(broken)
}

/// True if an absolute path starts with `path` on this line: not inside a longer path or a `$HOME/...`.
fn mentions_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '}' | '/'))
    })
}

#[test]
fn every_crate_takes_the_workspaces_lints() -> Result<()> {
    let mut broken = String::new();
    let mut crates = 0;
    for source in sources()?
        .iter()
        .filter(|source| source.path.ends_with("/Cargo.toml"))
    {
        crates += 1;
        let manifest: toml::Table = toml::from_str(&source.text).with_context(|| source.path.clone())?;
        let inherits = manifest
            .get("lints")
            .and_then(|lints| lints.get("workspace")?.as_bool());
        if inherits != Some(true) {
            writeln!(
                broken,
                "{}: wants [lints] workspace = true: one place decides on lints",
                source.path
            )?;
        }
    }
    ensure!(crates >= 4, "{crates} crates found, 4 were expected");
    none(broken)
}

#[test]
fn the_checks_themselves_see_what_they_should() {
    let text = "// unsafe \nlet a = \"unsafe { }\"; // x\nlet q = '\"'; unsafe { b() }\n#[cfg(test)]\nmod tests { unsafe {} }";
    let code = code(text);
    let lines: Vec<_> = code.lines().map(|line| mentions(line, "unsafe ")).collect();
    assert_eq!(lines, [false, false, true]);
    assert!(mentions("use tch::Tensor;", "tch::") && !mentions("batch::x", "tch::"));
    assert!(mentions("    #[ignore]", "#[ignore"));
    let place = ["/ro", "ot/"].concat();
    assert!(mentions_path(&format!("a \"{place}x\""), &place));
    assert!(
        !mentions_path(&format!("$HOME{place}x"), &place) && !mentions_path(&format!("..{place}"), &place)
    );
}
