"""Families of tests of which the default run takes a few cases only; ``-m slow`` takes the others.

By file and function: how many cases stay in the default run. A case more costs seconds: it starts processes, compiles,
or runs a whole suite.
"""

from __future__ import annotations

__all__ = ["KEPT"]

KEPT: dict[str, dict[str, int]] = {
    "tests/guard/test_compile.py": {
        "test_dynamic_shapes_are_held": 0,
        "test_model_compiled_inside_trains_on_after_the_block": 1,
        "test_compiled_train_step_is_held": 1,
        "test_every_form_of_compiling_is_held": 2,
        "test_block_inside_a_compiled_function": 3,
        "test_first_use_of_the_package_may_be_in_a_compiled_function": 0,
        "test_statistics_lent_in_a_graph_are_theirs": 2,
        "test_warm_graph_is_held_with_one_more_graph": 2,
        "test_statistics_replaced_inside_are_held_in_a_graph": 1,
        "test_held_graph_computes_what_an_unguarded_graph_does": 2,
    },
    "tests/guard/test_distributed.py": {
        "test_rank_zero_of_ddps_group_broadcasts": 0,
        "test_ddp_broadcast_with_four_ranks": 0,
        "test_run_names_a_rank_that_is_gone": 0,
        "test_a_post_of_an_earlier_attempt_is_ignored": 0,
        "test_run_reports_where_a_rank_fails": 0,
        "test_run_reports_once_for_all_ranks": 0,
        "test_process_without_others_is_alone": 0,
    },
    "tests/guard/test_export.py": {
        "test_program_made_inside_in_train_mode_is_the_twins": 40,
        "test_program_made_inside_in_eval_mode_is_the_twins": 40,
        "test_program_made_inside_nested_guards_is_the_twins": 4,
        "test_program_saved_inside_loads_where_bnguard_is_not_installed": 0,
        "test_tool_that_fails_inside_fails_as_unguarded": 4,
        "test_guarded_program_is_compared_at_exit": 10,
        "test_program_of_an_eval_mode_model_is_no_finding": 10,
    },
    "tests/guard/test_faults.py": {"test_model_survives_every_failing_call": 2},
    "tests/guard/test_func.py": {"test_transform_under_warn": 20, "test_traced_graph_has_nothing_of_the_guard": 8},
    "tests/guard/test_processes.py": {
        "test_model_sent_to_a_spawned_child_is_unguarded_there": 0,
        "test_data_loader_worker_guards_its_model": 1,
        "test_child_that_moves_shared_statistics_is_found": 1,
    },
    "tests/guard/test_decorate_compiled.py": {
        "test_compiled_caller_runs_it_guarded": 10,
        "test_eval_mode_is_compiled_as_it_is": 4,
    },
    "tests/guard/test_reference_cycles.py": {"test_compiled_model_goes": 1},
    "tests/guard/test_refused_graphs.py": {"test_warm_graph_changes_nothing_in_silence": 12},
    "tests/test_benchmarks.py": {"test_every_key_names_the_benchmark_that_makes_its_rows": 0},
    "tests/test_systems.py": {"test_program_runs_without_what_only_linux_has": 2},
    "tests/guard/test_fusion.py": {"test_model_fused_inside_is_the_twins": 24},
    "tests/guard/test_meta.py": {
        "test_fake_trace_has_nothing_of_the_guard": 8,
        "test_real_model_in_fake_mode_keeps_its_statistics": 40,
    },
    "tests/layers/test_odd_tensors.py": {
        "test_guarded_forward_is_the_twins": 62,
        "test_unreadable_statistics_are_refused": 34,
        "test_watch_and_audit_ask_what_can_be_answered": 96,
        "test_assertion_compares_or_refuses": 48,
        "test_statistics_replaced_inside_are_put_back": 48,
    },
    "tests/cli/test_commands.py": {"test_scripts_behave_as_under_python": 7},
    "tests/cli/test_demo.py": {"test_plot_is_a_picture_with_lines": 0, "test_runs_start_from_the_same_network": 0},
    "tests/cli/test_real_process.py": {"test_fork_and_real_process_are_alike": 0, "test_report_after_a_signal": 0},
    "tests/integrations/test_accelerate.py": {"test_restore_trains_as_the_twin": 6},
    "tests/integrations/test_ignite.py": {"test_missing_ignite_gives_the_install_line": 0},
    "tests/integrations/test_lightning.py": {
        "test_either_library_is_enough": 0,
        "test_missing_library_is_one_sentence": 0,
        "test_trial_runs_are_guarded": 2,
        "test_trial_runs_spend_no_budget": 1,
        "test_trial_runs_of_a_layer_in_eval_mode_are_no_finding": 1,
    },
    "tests/pytest_plugin/test_report.py": {"test_report_across_processes": 0},
    "tests/pytest_plugin/test_suite.py": {
        "test_torch_is_imported_before_any_test_is_in_its_way": 0,
        "test_compiled_models_are_compared": 1,
        "test_markers_are_unknown_without_the_plugin": 0,
        "test_many_models_in_one_test": 0,
        "test_warning_replaces_no_exception": 0,
        "test_collecting_imports_no_torch": 1,
        "test_compiled_models_run_without_warnings_of_torch": 0,
        "test_hypothesis_finds_and_shrinks": 0,
    },
    "tests/pytest_plugin/test_precedence.py": {"test_nearer_place_decides": 16},
    "tests/pytest_plugin/test_marker.py": {"test_model_is_found_in": 8},
    "tests/report/test_plots.py": {
        "test_names_of_many_layers_can_be_read": 1,
        "test_files_have_the_format_of_their_name": 2,
    },
    "tests/test_testing.py": {
        "test_strategies_leave_the_random_state_alone": 0,
        "test_nets_are_of_every_kind": 0,
    },
    "tests/test_readme.py": {
        "test_suite_of_a_page_passes": 0,
        "test_suite_passes": 1,
        "test_suite_passes_while_everything_is_watched": 0,
        "test_tests_of_the_suite_fail_where_they_should": 1,
    },
}
