//! The example of the engine as a library, compiled and run on a tiny model.

#[path = "../../engine/examples/generate.rs"]
#[allow(dead_code, reason = "the example's main is not called")]
mod generate;

use millrace_tests::tiny;

#[test]
fn the_example_gives_the_same_text_alone_streamed_and_in_a_batch() {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(folder.path(), 8).unwrap();
    let prompts: Vec<String> = ["Once", "Twice upon", "é"].iter().map(|&prompt| prompt.to_owned()).collect();
    let mut shown = Vec::new();
    let answers = generate::run(folder.path(), &prompts, &mut shown).unwrap();
    assert_eq!(answers.len(), 2 + prompts.len());
    assert!(!answers[0].is_empty());
    assert_eq!((&answers[0], &answers[0]), (&answers[1], &answers[2]));
    assert_ne!(answers[2], answers[3]);
    assert_eq!(String::from_utf8(shown).unwrap(), format!("{}\n", answers[1]));
}
