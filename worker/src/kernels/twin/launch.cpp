// The kernels by name, with arguments as a GPU's driver takes them: an address for each parameter. What the parameters are is
// spelled from the kernels' own declarations, so an argument that is forgotten, out of order or of another type is seen.

#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>

namespace {

// As launch.rs spells arguments.
template <class T>
struct Letter;
#define LETTER(TYPE, VALUE)                                                                                       \
    template <>                                                                                                   \
    struct Letter<TYPE> {                                                                                         \
        static constexpr char value = VALUE;                                                                      \
    };
LETTER(float, 'f')
LETTER(double, 'd')
LETTER(Bf16, 'h')
LETTER(u8, 'b')
LETTER(u32, 'u')
LETTER(u64, 'U')
LETTER(i64, 'l')
LETTER(int, 'i')
LETTER(RowMap, 'm')
LETTER(Selection, 's')
LETTER(History, 'H')
LETTER(Others, 'O')
LETTER(AdamW, 'A')

template <class T>
struct Spelling {
    static std::string text() { return {Letter<T>::value}; }
};
template <class T>
struct Spelling<T*> {
    static std::string text() { return {'>', Letter<T>::value}; }
};
template <class T>
struct Spelling<const T*> {
    static std::string text() { return {'<', Letter<T>::value}; }
};

template <auto KERNEL_FUNCTION, class = decltype(KERNEL_FUNCTION)>
struct Call;
template <auto KERNEL_FUNCTION, class... Parameters>
struct Call<KERNEL_FUNCTION, void (*)(Parameters...)> {
    static std::string signature() { return (Spelling<Parameters>::text() + ...); }

    template <size_t... I>
    static void spread(void** arguments, std::index_sequence<I...>) {
        KERNEL_FUNCTION(*static_cast<std::remove_cv_t<Parameters>*>(arguments[I])...);
    }
    static void run(void** arguments) { spread(arguments, std::index_sequence_for<Parameters...>{}); }
};

} // namespace

struct Named {
    const char* name;
    std::string signature;
    void (*run)(void** arguments);
};

namespace {

#define NAMED(KERNEL_NAME) Named{#KERNEL_NAME, Call<&KERNEL_NAME>::signature(), Call<&KERNEL_NAME>::run}

const std::vector<Named>& all() {
    static const std::vector<Named> kernels{
        NAMED(head_adamw_idle_rows),
        NAMED(head_adamw_rows_bf16),
        NAMED(head_adamw_rows_f32),
        NAMED(head_choose_digit),
        NAMED(head_count_chosen),
        NAMED(head_count_digits),
        NAMED(head_drop_columns_bf16),
        NAMED(head_drop_columns_f32),
        NAMED(head_embedding_gradient),
        NAMED(head_find_columns),
        NAMED(head_finish_embeddings),
        NAMED(head_largest_logits_bf16),
        NAMED(head_largest_logits_f32),
        NAMED(head_local_classes),
        NAMED(head_make_up_rows),
        NAMED(head_margin_logits),
        NAMED(head_mark_chosen),
        NAMED(head_mark_positives),
        NAMED(head_normalize_rows_bf16_bf16),
        NAMED(head_normalize_rows_bf16_f32),
        NAMED(head_normalize_rows_f32_bf16),
        NAMED(head_normalize_rows_f32_f32),
        NAMED(head_normalize_weights_bf16),
        NAMED(head_normalize_weights_f32),
        NAMED(head_sgd_rows_bf16),
        NAMED(head_sgd_rows_f32),
        NAMED(head_softmax_gradient_bf16),
        NAMED(head_softmax_gradient_f32),
        NAMED(head_softmax_rows),
        NAMED(head_softmax_terms_bf16),
        NAMED(head_softmax_terms_f32),
        NAMED(head_sum_chunks),
        NAMED(head_target_cosines),
        NAMED(head_write_chosen),
        NAMED(norm_apply_bf16),
        NAMED(norm_apply_f32),
        NAMED(norm_back_apply_bf16),
        NAMED(norm_back_apply_f32),
        NAMED(norm_back_sums_bf16),
        NAMED(norm_back_sums_f32),
        NAMED(norm_finish_back),
        NAMED(norm_finish_moments_bf16),
        NAMED(norm_finish_moments_f32),
        NAMED(norm_moments_bf16),
        NAMED(norm_moments_f32),
    };
    return kernels;
}

} // namespace

// The kernel of this name, or null.
extern "C" const Named* kernel_twin_find(const char* name) {
    for (const Named& kernel : all()) {
        if (std::strcmp(kernel.name, name) == 0) {
            return &kernel;
        }
    }
    return nullptr;
}

// How many there are.
extern "C" uint32_t kernel_twin_count() { return static_cast<uint32_t>(all().size()); }

extern "C" const char* kernel_twin_signature(const Named* kernel) { return kernel->signature.c_str(); }

// Runs this thread's part.
extern "C" void kernel_twin_call(const Named* kernel, void** arguments) { kernel->run(arguments); }

// Sizes and offsets of the structs that are arguments: for each its size, then where each field begins.
extern "C" const uint32_t* kernel_twin_layouts() {
#define OF(TYPE, FIELD) static_cast<uint32_t>(offsetof(TYPE, FIELD))
#define SIZE(TYPE) static_cast<uint32_t>(sizeof(TYPE))
    static const uint32_t layouts[] = {
        SIZE(History), OF(History, since), OF(History, products), OF(History, remembered), OF(History, now),
        SIZE(Others), OF(Others, scale_log2), OF(Others, scale_rest), OF(Others, zero_above), OF(Others, t),
        OF(Others, hard_above), OF(Others, shift),
        SIZE(AdamW), OF(AdamW, keep), OF(AdamW, one_less_beta1), OF(AdamW, beta2), OF(AdamW, one_less_beta2),
        OF(AdamW, rate), OF(AdamW, correction), OF(AdamW, eps),
        SIZE(RowMap), OF(RowMap, w_by_w_less_1), OF(RowMap, w_by_v), OF(RowMap, v_by_w), OF(RowMap, v_by_v),
        SIZE(Selection), OF(Selection, last), OF(Selection, remaining), OF(Selection, positives),
        OF(Selection, chosen),
        SIZE(Bf16),
    };
    return layouts;
}
