//! The shape of the job file, read off the serde types that are generated from `job.proto`: one list of keys, kept
//! in one place. Knows nothing of TOML or of what values mean.

use serde::de::value::Error as ProbeError;
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};

/// What a key takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A string.
    Text,
    /// `true` or `false`.
    Bool,
    /// A whole number from 0 to this.
    Whole(u64),
    /// A number, whole or not.
    Number,
    /// A list of one kind.
    List(Box<Kind>),
    /// Keys with what they take, in the order of the `.proto` file.
    Table(Vec<(&'static str, Kind)>),
}

impl Kind {
    /// The shape of a serde type.
    ///
    /// # Panics
    /// If the type holds something else than this enum can say: a mistake in the program, found by any test.
    pub fn of<'de, T: Deserialize<'de>>() -> Self {
        let mut kind = Kind::Bool;
        let read = T::deserialize(Probe(&mut kind));
        assert!(
            read.is_ok(),
            "the job file holds a type without a kind: {:?}",
            read.err()
        );
        kind
    }

    /// Keys of a table; none for anything else.
    pub fn keys(&self) -> &[(&'static str, Kind)] {
        match self {
            Kind::Table(keys) => keys,
            _ => &[],
        }
    }

    /// What it takes under a key.
    pub fn get(&self, key: &str) -> Option<&Kind> {
        self.keys()
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, kind)| kind)
    }

    /// In words, after "is not".
    pub fn describe(&self) -> String {
        match self {
            Kind::Text => "a string".into(),
            Kind::Bool => "true or false".into(),
            Kind::Whole(u64::MAX) => "a whole number of at least 0".into(),
            Kind::Whole(max) => format!("a whole number from 0 to {max}"),
            Kind::Number => "a number".into(),
            Kind::List(of) => match **of {
                Kind::Text => "a list of strings".into(),
                _ => "a list of numbers".into(),
            },
            Kind::Table(_) => "a section".into(),
        }
    }
}

/// Answers every question of a `Deserialize` with an empty value and notes what was asked for.
struct Probe<'a>(&'a mut Kind);

macro_rules! answers {
    ($($method:ident: $kind:expr => $visit:ident($value:expr);)+) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ProbeError> {
            *self.0 = $kind;
            visitor.$visit($value)
        }
    )+};
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = ProbeError;

    answers! {
        deserialize_bool: Kind::Bool => visit_bool(false);
        deserialize_u32: Kind::Whole(u32::MAX.into()) => visit_u32(0);
        deserialize_u64: Kind::Whole(u64::MAX) => visit_u64(0);
        deserialize_f64: Kind::Number => visit_f64(0.0);
        deserialize_str: Kind::Text => visit_str("");
        deserialize_string: Kind::Text => visit_str("");
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ProbeError> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ProbeError> {
        let mut of = Kind::Bool;
        let value = visitor.visit_seq(OneElement(Some(&mut of)))?;
        *self.0 = Kind::List(Box::new(of));
        Ok(value)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ProbeError> {
        let mut keys = Vec::with_capacity(fields.len());
        let value = visitor.visit_map(EveryField {
            fields: fields.iter(),
            keys: &mut keys,
        })?;
        *self.0 = Kind::Table(keys);
        Ok(value)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, ProbeError> {
        Err(ProbeError::custom("no kind for it"))
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u128 f32 char bytes byte_buf unit unit_struct newtype_struct tuple
        tuple_struct map enum identifier ignored_any
    }
}

/// A list of one element, to see what it holds.
struct OneElement<'a>(Option<&'a mut Kind>);

impl<'de> SeqAccess<'de> for OneElement<'_> {
    type Error = ProbeError;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, ProbeError> {
        self.0
            .take()
            .map(|kind| seed.deserialize(Probe(kind)))
            .transpose()
    }
}

/// A map with every field of a struct.
struct EveryField<'a> {
    fields: std::slice::Iter<'static, &'static str>,
    keys: &'a mut Vec<(&'static str, Kind)>,
}

impl<'de> MapAccess<'de> for EveryField<'_> {
    type Error = ProbeError;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, ProbeError> {
        let Some(field) = self.fields.next() else {
            return Ok(None);
        };
        self.keys.push((field, Kind::Bool));
        seed.deserialize((*field).into_deserializer()).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, ProbeError> {
        match self.keys.last_mut() {
            Some((_, kind)) => seed.deserialize(Probe(kind)),
            None => Err(ProbeError::custom("a value before its key")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arcface_proto::v1;

    #[test]
    fn the_job_file_has_the_sections_and_keys_of_the_proto_file() {
        let shape = Kind::of::<v1::JobSpec>();
        let sections: Vec<_> = shape.keys().iter().map(|(name, _)| *name).collect();
        assert_eq!(
            sections,
            [
                "output",
                "job",
                "model",
                "head",
                "data",
                "train",
                "eval",
                "checkpoint"
            ]
        );
        let head = shape.get("head").expect("section");
        assert_eq!(head.get("num_classes"), Some(&Kind::Whole(u32::MAX.into())));
        assert_eq!(head.get("margin_list"), Some(&Kind::List(Box::new(Kind::Number))));
        assert_eq!(head.get("margin_gradient"), Some(&Kind::Text));
        assert_eq!(
            shape.get("eval").and_then(|eval| eval.get("verbose")),
            Some(&Kind::Whole(u64::MAX))
        );
        assert_eq!(head.get("nothing"), None);
    }
}
