//! What a rank's tensors take, for the message when memory does not suffice. libtorch says that with a panic, which is
//! made one line here.

use super::failure::RankFailure;
use super::step::Trainer;
use crate::panics;
use std::any::Any;
use std::fmt;
use std::fs;

/// What libtorch's message has in it when a GPU's memory is used up.
const OUT_OF_MEMORY: &str = "out of memory";
/// What it has in it when the system gives no more.
const CANNOT_ALLOCATE: &str = "can't allocate memory";

/// Bytes of what stays from step to step, by name, and where it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Account {
    place: String,
    tensors: Vec<(String, u64)>,
}

impl Account {
    /// Of a trainer before its first step; none on a CPU, where the kernel ends a process that takes too much.
    pub fn of(trainer: &mut Trainer) -> Option<Self> {
        let place = trainer.placement.gpu()?.to_string();
        Some(Self::at(place, trainer))
    }

    pub(super) fn at(place: String, trainer: &mut Trainer) -> Self {
        let bytes = |tensors: &mut dyn Iterator<Item = &tch::Tensor>| -> u64 {
            tensors
                .map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64)
                .sum()
        };
        let backbone = trainer.backbone.state().iter().map(|entry| &entry.tensor);
        let mut tensors = vec![("backbone".to_owned(), bytes(&mut { backbone }))];
        for (slot, buffers) in trainer.optimizer.state() {
            tensors.push((format!("its {slot}"), bytes(&mut buffers.iter())));
        }
        for (name, tensor) in trainer.head.state() {
            tensors.push((format!("head {name}"), bytes(&mut std::iter::once(&tensor))));
        }
        Self { place, tensors }
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(f, "{} has besides activations and batch:", self.place)?;
        for (index, (name, bytes)) in self.tensors.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma} {name} {:.1} MiB", mib(*bytes))?;
        }
        Ok(())
    }
}

/// Refuses a head whose weights and optimizer state alone are more than the machine has: the system would end this process and
/// others, in every generation anew.
///
/// # Errors
/// Permanent, with both numbers.
pub fn check_head(bytes: u64, machine: Option<u64>) -> Result<(), RankFailure> {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    match machine {
        Some(machine) if bytes > machine => {
            let message = format!(
                "the head's weights and optimizer state take {:.1} GiB of this rank, and the machine has {:.1} GiB",
                gib(bytes),
                gib(machine)
            );
            Err(RankFailure::permanent(message)
                .hint("more ranks, or fewer classes; arcface-coordinator plan tells what fits"))
        }
        _ => Ok(()),
    }
}

/// Bytes of memory and swap of this machine, where the kernel tells.
pub fn of_machine() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(1024 * (kib("MemTotal:")? + kib("SwapTotal:").unwrap_or(0)))
}

/// The failure that a panic stands for, if it is about memory.
pub fn out_of_memory(panic: &(dyn Any + Send), account: Option<&Account>) -> Option<RankFailure> {
    let text = panics::text(panic)?;
    // "CUDA out of memory. Tried to allocate 2.00 GiB. ..": two sentences tell all that is worth a line. "can't allocate memory: you
    // tried to allocate 4096 bytes. ..": one.
    let of_gpu = text.find(OUT_OF_MEMORY).map(|at| (at, 2));
    let (at, sentences) = of_gpu.or_else(|| text.find(CANNOT_ALLOCATE).map(|at| (at, 1)))?;
    let told: Vec<&str> = text[at..].split_inclusive(". ").take(sentences).collect();
    let told = told.concat();
    let told = told
        .lines()
        .next()
        .unwrap_or(OUT_OF_MEMORY)
        .trim_end_matches(['.', ' ']);
    let account = account.map(|account| format!("; {account}")).unwrap_or_default();
    Some(RankFailure::permanent(format!("{told}{account}")).hint(
        "a smaller train.batch_size, model.gradient_checkpointing or more ranks; arcface-coordinator plan tells what fits",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_that_no_machine_holds_is_refused() {
        assert!(check_head(1 << 40, None).is_ok() && check_head(4, Some(4)).is_ok());
        let failure = check_head(8 << 40, Some(24 << 30)).expect_err("refused");
        assert_eq!(
            failure.message,
            "the head's weights and optimizer state take 8192.0 GiB of this rank, and the machine has 24.0 GiB"
        );
        assert!(failure.permanent);
        assert!(!cfg!(target_os = "linux") || of_machine().is_some_and(|bytes| bytes > 1 << 28));
    }

    #[test]
    fn a_panic_about_memory_becomes_a_line_with_an_account_and_others_do_not() {
        let account = Account {
            place: "GPU 0".to_owned(),
            tensors: vec![
                ("backbone".to_owned(), 3 << 20),
                ("head weight".to_owned(), 1 << 19),
            ],
        };
        let torch = "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate 2.00 GiB. \
                     GPU 0 has a total capacity of 79.10 GiB of which 1.05 GiB is free. \\nException raised from\")";
        let panic: Box<dyn Any + Send> = Box::new(torch.to_owned());
        let failure = out_of_memory(panic.as_ref(), Some(&account)).expect("it is about memory");
        assert_eq!(
            failure.message,
            "out of memory. Tried to allocate 2.00 GiB; GPU 0 has besides activations and batch: backbone 3.0 MiB, \
             head weight 0.5 MiB"
        );
        assert!(failure.permanent && failure.hint.contains("plan"));
        assert!(out_of_memory(&"index out of bounds", None).is_none());
        assert!(out_of_memory(&7u8, None).is_none());
        let short = out_of_memory(&"CUDA error: out of memory\nmore", None).expect("it is");
        assert_eq!(short.message, "out of memory");
        let cpu = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate \
                   8796093020160 bytes. Error code 12 (Cannot allocate memory)";
        let failure = out_of_memory(&cpu, None).expect("it is about memory");
        assert_eq!(
            failure.message,
            "can't allocate memory: you tried to allocate 8796093020160 bytes"
        );
    }
}
