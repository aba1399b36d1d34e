//! Classes, deadlines and the output that is expected: who comes in, who gives way.

use super::*;

#[test]
fn a_higher_class_and_an_earlier_deadline_go_first() {
    let policy = SchedulerPolicy { max_sequences: 1, ..policy() };
    let mut world = World::new(policy, 32, false, 1);
    let by = |deadline_ms| Urgency { deadline_ms, ..Urgency::default() };
    let running = submit_as(&mut world, of(Class::High), vec![1; 3], 3);
    world.step();
    let low = submit_as(&mut world, of(Class::Low), vec![1; 3], 3);
    let whenever = submit(&mut world, vec![1; 3], 3);
    let late = submit_as(&mut world, by(9), vec![1; 3], 3);
    let early = submit_as(&mut world, by(5), vec![1; 3], 3);
    let high = submit_as(&mut world, of(Class::High), vec![1; 3], 3);
    assert_eq!(world.scheduler.waiting_by_class(), [1, 3, 1]);
    assert_eq!(finish(&mut world), [running, high, early, late, whenever, low]);
    assert_eq!(world.scheduler.counters().preemptions, 0, "they waited for no more than their turn");
}

#[test]
fn lower_classes_give_way_where_a_higher_one_has_no_place() {
    // By places, and by blocks: 8 of them, of which the two low ones hold 6.
    for max_sequences in [2, 6] {
        let mut world = World::new(SchedulerPolicy { max_sequences, ..policy() }, 8, false, 1);
        let first = submit_as(&mut world, of(Class::Low), vec![1; 8], 4);
        let second = submit_as(&mut world, of(Class::Low), vec![2; 4], 8);
        world.step();
        world.step();
        assert_eq!(world.scheduler.running(), [first, second]);
        let high = submit_as(&mut world, of(Class::High), vec![3; 10], 6);
        let normal = submit(&mut world, vec![4; 16], 12);
        world.step();
        assert_eq!(world.scheduler.running(), [high, first], "the last one gave way, and only that one");
        assert_eq!(world.scheduler.waiting().collect::<Vec<_>>(), [normal, second]);
        assert_eq!(finish(&mut world).len(), 4);
    }
}

#[test]
fn equals_and_what_would_not_be_enough_stay() {
    let mut world = World::new(policy(), 8, false, 1);
    let high = submit_as(&mut world, of(Class::High), vec![1; 10], 6);
    let low = submit_as(&mut world, of(Class::Low), vec![2; 4], 4);
    world.step();
    world.step();
    let other = submit_as(&mut world, of(Class::High), vec![3; 20], 8);
    world.step();
    assert_eq!(world.scheduler.running(), [high, low], "the low one's blocks would not do");
    assert_eq!(world.scheduler.waiting().collect::<Vec<_>>(), [other]);
}

/// Urgent ones keep coming, faster than they can run: the bound of the module's head.
#[test]
fn none_starves() {
    let policy = SchedulerPolicy { max_sequences: 2, ..policy() };
    let mut world = World::new(policy, 32, false, 1);
    submit_as(&mut world, of(Class::High), vec![1; 3], 3);
    let low = submit_as(&mut world, of(Class::Low), vec![1; 3], 3);
    let mut admitted = 0;
    while !world.scheduler.running().contains(&low) {
        while world.live.len() < 8 {
            submit_as(&mut world, of(Class::High), vec![1; 3], 3);
        }
        world.step();
        admitted = world.scheduler.admissions;
    }
    // Beyond the bound: the one that came before, what a step had admitted by then, and itself.
    assert!((ADMISSIONS_AHEAD_MAX..=ADMISSIONS_AHEAD_MAX + 4).contains(&admitted), "{admitted}");
    submit_as(&mut world, of(Class::High), vec![1; 3], 3);
    world.step();
    assert!(world.scheduler.running().contains(&low), "it gives way to none");
}

/// 64 chats that may be as long as the cache allows, and end after about 12 tokens, beside the same with a limit that
/// fits: the most that run at once.
#[test]
fn chats_without_a_limit_run_nearly_as_many_at_once() {
    let most = |max_tokens: u32, output_reserve: OutputReserve| {
        let policy = SchedulerPolicy { max_sequences: 64, max_batch_tokens: 512, output_reserve, ..policy() };
        let mut world = World::new(policy, 256, false, 1);
        let mut at_once = 0;
        for _ in 0..40 {
            for _ in world.live.len()..64 {
                submit(&mut world, vec![1; 8], max_tokens);
            }
            world.step();
            at_once = at_once.max(world.scheduler.running().len());
        }
        finish(&mut world);
        (at_once, world.scheduler.counters().preemptions)
    };
    let (with_limit, _) = most(16, OutputReserve::Full);
    let (reserved, _) = most(1000, OutputReserve::Full);
    let (learned, preemptions) = most(1000, OutputReserve::Learned);
    assert!(reserved <= 2, "{reserved}");
    assert!(learned * 10 >= with_limit * 9, "{learned} beside {with_limit}");
    assert!(preemptions <= 4, "{preemptions}");
}

/// 20 blocks, all promised to low sequences that hold 4 of them.
#[test]
fn what_is_promised_to_lower_classes_keeps_no_higher_one_out() {
    let mut world = World::new(policy(), 20, false, 1);
    let first = submit_as(&mut world, of(Class::Low), vec![1; 4], 36);
    let second = submit_as(&mut world, of(Class::Low), vec![2; 4], 36);
    world.step();
    assert_eq!(world.scheduler.running(), [first, second]);
    let high = submit_as(&mut world, of(Class::High), vec![3; 8], 12);
    world.step();
    assert_eq!(world.scheduler.running(), [high, first]);
}

/// What a sequence of the same class was promised is not there for another one, whatever lower ones hold.
#[test]
fn nothing_gives_way_in_vain() {
    let mut world = World::new(policy(), 12, false, 1);
    let high = submit_as(&mut world, of(Class::High), vec![1; 4], 20);
    let low = submit_as(&mut world, of(Class::Low), vec![2; 8], 8);
    world.step();
    assert_eq!(world.scheduler.running(), [high, low]);
    let other = submit_as(&mut world, of(Class::High), vec![3; 8], 20);
    world.step();
    assert_eq!((world.scheduler.running(), world.scheduler.counters().preemptions), (&[high, low][..], 0));
    assert_eq!(world.scheduler.waiting().collect::<Vec<_>>(), [other]);
}
