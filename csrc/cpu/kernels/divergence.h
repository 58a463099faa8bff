// The divergences, one struct each. A struct says how a key contributes while the keys stream past,
// how the row's value follows from the sums, and what the gradient with respect to a logit is.
//
// Everything is in base 2 with u = s - t the difference of raw logits; a and b are probabilities,
// and p, pt the same before normalisation. Derivations: D = ln2 * finish(...) is the definition
// with log a = ln2 (s - Ls) and log b = ln2 (t - Lt) put in and the sums pulled apart.
#pragma once

#include "bias.h"

namespace attn_kd::ATTN_KD_ISA {

struct NoDivergence {
  static constexpr bool kTeacher = false;
  static constexpr bool kTeacherProbability = false;
};

// KL(student || teacher) = sum a log(a / b); dD/ds = a (log(a / b) - D)
struct ReverseKL {
  static constexpr bool kTeacher = true;
  static constexpr bool kTeacherProbability = false;

  template <class V>
  static V term(V p, V, V u) {
    return p * u;
  }
  template <class T>
  static T finish(T sum, T student_sum, T, T lse, T teacher_lse) {
    return sum / student_sum - lse + teacher_lse;
  }
  template <class T>
  static T offset(T grad, T divergence, T lse, T teacher_lse) {
    return grad * (T(kLn2) * (teacher_lse - lse) - divergence);
  }
  template <class T>
  static T slope(T grad) {
    return grad * T(kLn2);
  }
  template <class V>
  static V grad_logit(V a, V, V u, V grad_probability, V slope) {
    return a * (grad_probability + slope * u);
  }
};

// KL(teacher || student) = sum b log(b / a); dD/ds = a - b
struct ForwardKL {
  static constexpr bool kTeacher = true;
  static constexpr bool kTeacherProbability = true;

  template <class V>
  static V term(V, V pt, V u) {
    return -(pt * u);
  }
  template <class T>
  static T finish(T sum, T, T teacher_sum, T lse, T teacher_lse) {
    return sum / teacher_sum + lse - teacher_lse;
  }
  template <class T>
  static T offset(T grad, T, T, T) {
    return grad;
  }
  template <class T>
  static T slope(T grad) {
    return grad;
  }
  template <class V>
  static V grad_logit(V a, V b, V, V grad_probability, V slope) {
    return a * grad_probability - slope * b;
  }
};

}  // namespace attn_kd::ATTN_KD_ISA
