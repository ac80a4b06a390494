//! What a rank's tensors take, for the message when a GPU's memory does not suffice. libtorch says that with a panic, which is
//! made one line here.

use super::failure::RankFailure;
use super::step::Trainer;
use std::any::Any;
use std::fmt;

/// What libtorch's message has in it when a GPU's memory is used up.
const OUT_OF_MEMORY: &str = "out of memory";

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

/// The failure that a panic stands for, if it is about a GPU's memory.
pub fn out_of_memory(panic: &(dyn Any + Send), account: Option<&Account>) -> Option<RankFailure> {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())?;
    let at = text.find(OUT_OF_MEMORY)?;
    // "CUDA out of memory. Tried to allocate 2.00 GiB. ..": two sentences tell all that is worth a line.
    let told: Vec<&str> = text[at..].split_inclusive(". ").take(2).collect();
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
    }
}
