//! What the examples of this project share.
//!
//! | module | what it does |
//! |---|---|
//! | [`config`], [`family`], [`rope_scaling`] | `config.json` of a model folder: sizes, what families of models differ in, RoPE |
//! | [`checkpoint`] | tensors of one or more safetensors files, as f32 |
//! | [`linear`], [`ops`] | matrix product, norms, activation, cross entropy |
//! | [`model`] | weights of a model |
//! | [`vocabulary`] | what its tokens stand for: bytes, or what `tokenizer.json` says |
//! | [`forward`] | the forward pass on the processor, around attention that the caller supplies |
//! | [`session`] | a model reading one sequence, with the library's cache and attention |
//! | [`device`] | the device that attention runs on |
//! | [`random`] | numbers of a seed |
//! | [`text`] | texts to read |
//! | [`plot`] | colours, fonts, SVG and PNG |
//! | [`terminal`] | progress and output |
//! | [`error`] | what can go wrong |

pub mod checkpoint;
pub mod config;
pub mod device;
pub mod error;
pub mod family;
pub mod forward;
pub mod linear;
pub mod model;
pub mod ops;
pub mod plot;
pub mod random;
pub mod rope_scaling;
pub mod session;
pub mod terminal;
pub mod text;
pub mod vocabulary;
