// The divergences, one struct each, and the list of them, from which all else is derived: the names
// that the operators take, the kernels that are compiled, and which of them a call runs.
//
// All are separable, D = sum phi(a, b) over the keys, a and b the student's and the teacher's
// probability of a key. `value` is phi and `slope` dphi/da (up to a constant, which the gradient
// does not see) times the scale of a, both in natural units:
//   dD/ds_j = a_j (slope_j - sum_k a_k slope_k)
// `renormalised` is D of the maps that a and b would be were their sums over the row, student_sum
// and teacher_sum, off by no rounding: D moves with these sums where it would not move with the
// roundings of single probabilities, which cancel. Those three make a divergence (see TwoPass), of
// single heads and of their average, which a second pass over the keys compares once the first has
// found the rows' sums.
//
// A divergence that is linear in the logits' difference needs no second pass over a single head
// (OnePass): its struct says besides how a key contributes while the keys stream past, how the
// row's value follows from the sums, and what the gradient with respect to a logit is. There
// everything is in base 2. u = s - t is the difference of the logits, each measured from an origin
// of its row: near the student's highest logit, and the teacher's LSE (or near its highest logit,
// while that is not known; see running_sums.h). So u is small, some bits at most, wherever the maps
// are alike, and keeps its digits. p and pt are a and b
// before normalisation. Derivations: D = ln2 * finish(...) is the definition with
// log a = ln2 (s - log_sum) and log b = ln2 (t - teacher_log_sum) put in and the sums pulled apart.
// In the gradient the LSEs cancel; what is left is p (grad_probability + ...) with the row's
// inverse sum folded into all that p is multiplied by.
#pragma once

#include "../problem.h"
#include "bias.h"
#include "log2.h"

namespace attn_kd::ATTN_KD_ISA {

// For divisions and logarithms, which need a normal number.
template <class T>
inline vec<T> above_zero(vec<T> x) {
  constexpr T kSmallest = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
  return max_or_second<T>(broadcast(kSmallest), x);
}

// A key of the maps that are compared, one query row a lane: of two heads, or of averages over
// heads, where all of a key's probabilities may underflow. Logarithms then take them relative to
// the largest: a = scale * mass, with a mass that underflows nowhere.
template <class T>
struct Probabilities {
  vec<T> a, b;
  vec<T> scale, mass;  // 1 and a where the divergence takes no log_ratio
  vec<T> log_ratio;    // log(a / b), natural; 0 where the mask hides the pair
};

// What the probabilities of a row sum to, and what they would without roundings.
struct MapSums {
  double student, teacher;
  double exact_student, exact_teacher;

  double student_factor() const { return student > 0 ? exact_student / student : 1; }
  double teacher_factor() const { return teacher > 0 ? exact_teacher / teacher : 1; }
};

// What a struct inherits: a divergence of single heads that one pass over the keys has, or that
// takes two. kLogRatio: whether it uses log_ratio, as one does to whose value or gradient a key
// whose probability underflows may matter.
struct OnePass {
  static constexpr bool kOnePass = true;
  static constexpr bool kLogRatio = true;
  static constexpr bool kTeacher = true;
};

struct TwoPass {
  static constexpr bool kOnePass = false;
  static constexpr bool kLogRatio = false;
  static double renormalised(double sum, const MapSums&) { return sum; }
};

// Plain attention.
struct NoDivergence {
  static constexpr bool kTeacher = false;
  static constexpr bool kTeacherProbability = false;
};

// KL(student || teacher) = sum a log(a / b); dD/ds = a (log(a / b) - D) = a (u - sum a u)
struct ReverseKL : OnePass {
  static constexpr char kName[] = "reverse_kl";
  static constexpr bool kTeacherProbability = false;

  template <class V>
  static V term(V p, V, V u) {
    return p * u;
  }
  template <class T>
  static T finish(T sum, T student_sum, T, T log_sum, T teacher_log_sum) {
    return sum / student_sum - log_sum + teacher_log_sum;
  }
  // The sum of terms when u grows by `shift` everywhere.
  template <class V>
  static V shifted(V sum, V student_sum, V, V shift) {
    return sum + shift * student_sum;
  }
  // The part of the gradient that u must be measured from: sum a u, in natural units.
  template <class T>
  static T correction(T sum, T student_sum, T shift) {
    return T(kLn2) * (sum / student_sum + shift);
  }
  // What the gradient measures the teacher's logits from: so that sum a u vanishes, and with it
  // the offset. Both are common to all keys of a row, and so would be their roundings, which the
  // products with the keys would then add up.
  static double teacher_origin(double teacher_lse, double correction) {
    return teacher_lse - correction * kLog2e;
  }
  // `moved` is by how much the origin, once rounded, lies above the LSE.
  static double row_offset(double grad, double correction, double moved) {
    return -grad * (correction + kLn2 * moved);
  }
  static double row_slope(double grad, double inverse_sum, double) {
    return grad * kLn2 * inverse_sum;
  }
  template <class V>
  static V grad_logit(V p, V, V u, V grad_probability, V slope) {
    return p * (grad_probability + slope * u);
  }
  template <class T>
  static vec<T> value(const Probabilities<T>& key) {
    return key.a * key.log_ratio;
  }
  template <class T>
  static vec<T> slope(const Probabilities<T>& key) {
    return key.scale * key.log_ratio;
  }
  static double renormalised(double sum, const MapSums& sums) {
    return sums.student_factor() *
           (sum + sums.student * __builtin_log(sums.student_factor() / sums.teacher_factor()));
  }
};

// KL(teacher || student) = sum b log(b / a); dD/ds = a - b
struct ForwardKL : OnePass {
  static constexpr char kName[] = "forward_kl";
  static constexpr bool kTeacherProbability = true;

  template <class V>
  static V term(V, V pt, V u) {
    return -(pt * u);
  }
  template <class T>
  static T finish(T sum, T, T teacher_sum, T log_sum, T teacher_log_sum) {
    return sum / teacher_sum + log_sum - teacher_log_sum;
  }
  template <class V>
  static V shifted(V sum, V, V teacher_sum, V shift) {
    return sum - shift * teacher_sum;
  }
  template <class T>
  static T correction(T, T, T) {
    return 0;
  }
  static double teacher_origin(double teacher_lse, double) { return teacher_lse; }
  static double row_offset(double grad, double, double) { return grad; }
  static double row_slope(double grad, double, double moved) { return grad * (1 + kLn2 * moved); }
  template <class V>
  static V grad_logit(V p, V b, V, V grad_probability, V slope) {
    return p * grad_probability - slope * b;
  }
  template <class T>
  static vec<T> value(const Probabilities<T>& key) {
    return -key.b * key.log_ratio;
  }
  template <class T>
  static vec<T> slope(const Probabilities<T>& key) {
    return -key.b / above_zero<T>(key.mass);
  }
  static double renormalised(double sum, const MapSums& sums) {
    return sums.teacher_factor() *
           (sum + sums.teacher * __builtin_log(sums.teacher_factor() / sums.student_factor()));
  }
};

// Jensen-Shannon: 1/2 KL(a || m) + 1/2 KL(b || m) with m = (a + b) / 2
struct JensenShannon : TwoPass {
  static constexpr char kName[] = "js";

  template <class T>
  static vec<T> value(const Probabilities<T>& key) {
    const vec<T> inverse_mean = inverse_of_mean<T>(key);
    return T(0.5) * (key.a * log_of_share<T>(key.a, inverse_mean) +
                     key.b * log_of_share<T>(key.b, inverse_mean));
  }
  template <class T>
  static vec<T> slope(const Probabilities<T>& key) {
    return T(0.5) * log_of_share<T>(key.a, inverse_of_mean<T>(key));
  }

 private:
  template <class T>
  static vec<T> inverse_of_mean(const Probabilities<T>& key) {
    return T(2) / (above_zero<T>(key.a) + above_zero<T>(key.b));
  }
  template <class T>
  static vec<T> log_of_share(vec<T> probability, vec<T> inverse_mean) {
    return T(kLn2) * log2<T>(above_zero<T>(probability) * inverse_mean);
  }
};

// Attention transfer: sum (a - b)^2
struct MeanSquaredError : TwoPass {
  static constexpr char kName[] = "mse";

  template <class T>
  static vec<T> value(const Probabilities<T>& key) {
    return (key.a - key.b) * (key.a - key.b);
  }
  template <class T>
  static vec<T> slope(const Probabilities<T>& key) {
    return T(2) * (key.a - key.b);
  }
};

template <class... Div>
struct DivergenceList {
  struct Entries {
    cpu::Divergence entry[sizeof...(Div)];
  };
  static constexpr Entries described() {
    int8_t index = 0;
    return {{{index++, Div::kName, Div::kOnePass}...}};
  }

  // Calls visit(Div{}) for the one that is meant, if any.
  template <class Visitor>
  static void visit(cpu::Divergence wanted, Visitor visitor) {
    int8_t index = 0;
    ((index++ == wanted.index ? visitor(Div{}) : void()), ...);
  }
};

using Divergences = DivergenceList<ReverseKL, ForwardKL, JensenShannon, MeanSquaredError>;

inline constexpr Divergences::Entries kDivergences = Divergences::described();

// Calls visit(Div{}) for what a pass over single heads computes beside attention, which may be
// nothing.
template <class Visitor>
inline void visit_one_pass_divergence(cpu::Divergence wanted, Visitor visitor) {
  if (!wanted) return visitor(NoDivergence{});
  Divergences::visit(wanted, [&](auto divergence) {
    if constexpr (divergence.kOnePass) visitor(divergence);
  });
}

}  // namespace attn_kd::ATTN_KD_ISA
